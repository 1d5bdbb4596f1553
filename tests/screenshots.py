"""`python -m tests.screenshots`: pictures of the dashboard for the README, from a real cluster under real load."""

import argparse
import asyncio
import base64
import itertools
import math
import random
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from cluster import Cluster
from tests.browser import CHROMIUM_FLAGS, PROGRAMS
from tests.chaos.client import NoAnswer, NotSent, Server
from tests.support import PATIENCE_S

IMAGES: Final = Path(__file__).parent.parent / "docs" / "images"
BYTES_MAX: Final = 200_000

CHANNELS: Final[Mapping[str, tuple[int, float]]] = {
    "scores.live": (220, 1.0),
    "chat.lobby": (120, 2.0),
    "news": (90, 0.3),
    "prices.eur-usd": (60, 6.0),
    "prices.gold": (40, 3.0),
    "orders.berlin": (24, 1.5),
    "orders.lisbon": (16, 1.0),
    "deploys": (10, 0.1),
    "user.42.inbox": (3, 0.2),
    "user.7.inbox": (2, 0.2),
    "sensors.roof": (0, 8.0),
}
"""How many clients poll each, and how often something is published to it, per second and on average."""

VIEWS: Final = {
    "dashboard-light": ("light", 1280, 2000, 1.0),
    "dashboard-dark": ("dark", 1280, 2000, 1.0),
    "dashboard-phone": ("light", 390, 1090, 1.5),
}
"""Colour scheme, width and greatest height in CSS pixels, device pixels in one of these."""


async def _poll(address: str, channel: str, rng: random.Random) -> None:
    """A client: most wait as long as they may, some are impatient, and now and then one asks for nonsense."""
    server = Server(address)
    start = "latest"
    await asyncio.sleep(rng.uniform(0, 8))
    try:
        while True:
            wrong = "&chanel=x" if rng.random() < 0.001 else ""
            timeout = rng.choice((2, 10, 25, 25))
            path = f"/poll?channel={channel}&start={start}&timeout={timeout}{wrong}"
            patience = 0.2 if rng.random() < 0.01 else timeout + 5
            with suppress(NoAnswer, NotSent):
                reply = await server.request(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode(), patience)
                if reply.status == 200:
                    start = str(msgspec.json.decode(reply.body)["next"])
            await asyncio.sleep(rng.uniform(0, 0.02))
    finally:
        await server.close()


async def _publish(address: str, channel: str, rate: float, rng: random.Random) -> None:
    """A back end, with a tide of two minutes and bursts."""
    server = Server(address)
    number = 0
    try:
        while True:
            tide = 1 + 0.6 * math.sin(time.monotonic() * 2 * math.pi / 75)
            await asyncio.sleep(rng.expovariate(rate * tide))
            for _ in range(rng.choice((1, 1, 1, 1, 3))):
                number += 1
                data = {"number": number, "value": round(rng.gauss(100, 5), 2)}
                body = msgspec.json.encode({"channels": [channel], "data": data})
                head = f"POST /publish HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n\r\n"
                with suppress(NoAnswer, NotSent):
                    await server.request(head.encode() + body, PATIENCE_S)
    finally:
        await server.close()


async def _load(address: str, over: threading.Event, rng: random.Random) -> None:
    tasks = []
    for channel, (polls, rate) in CHANNELS.items():
        tasks += [asyncio.create_task(_poll(address, channel, rng)) for _ in range(polls)]
        tasks.append(asyncio.create_task(_publish(address, channel, rate, rng)))
    while not over.is_set():
        await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def load(address: str, seed: int) -> Iterator[None]:
    """Clients and back ends, in a thread of their own."""
    over = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_load(address, over, random.Random(seed))))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def chromium(folder: str) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own."""
    options = Options()
    options.binary_location = str(PROGRAMS["chromium"])
    for flag in (*CHROMIUM_FLAGS, "--hide-scrollbars", f"--user-data-dir={folder}/chromium"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(str(PROGRAMS["chromium-driver"])))
    try:
        yield driver
    finally:
        driver.quit()


def look(browser: webdriver.Chrome, scheme: str, width: int, height_max: int, scale: float) -> bytes:
    """The page as PNG, from its top."""

    def tell(command: str, parameters: Mapping[str, Any]) -> Any:
        return browser.execute_cdp_cmd(command, dict(parameters))

    tell("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": width < 500}
    tell("Emulation.setDeviceMetricsOverride", size)
    time.sleep(2.2)  # For two more samples, drawn at this width.
    height = min(browser.execute_script("return document.documentElement.scrollHeight"), height_max)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = tell("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip})
    return base64.b64decode(shot["data"])


def shrink(picture: bytes) -> bytes:
    """The same PNG (8 bits, RGB) with a palette: the 256 most frequent colours, and for each other the nearest."""
    width, height, *form = struct.unpack(">IIBBBBB", picture[16:29])
    assert form == [8, 2, 0, 0, 0], form
    rows = [list(zip(*[iter(row)] * 3, strict=True)) for row in _rows(picture, width * 3, height)]
    colours = Counter(itertools.chain.from_iterable(rows))
    palette = [colour for colour, _ in colours.most_common(256)]
    index = {colour: _nearest(colour, palette) for colour in colours}
    body = b"".join(b"\0" + bytes(map(index.__getitem__, row)) for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", bytes(itertools.chain(*palette))), (b"IDAT", zlib.compress(body, 9)))
    return picture[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (*chunks, (b"IEND", b""))
    )


def _nearest(colour: tuple[int, ...], palette: Sequence[tuple[int, ...]]) -> int:
    return min(range(len(palette)), key=lambda at: math.dist(colour, palette[at]))


def _rows(picture: bytes, size: int, height: int) -> Iterator[bytes]:
    """The lines of pixels of a PNG, each of `size` bytes, without their filters."""
    data, at = b"", 8
    while at < len(picture):
        length, name = struct.unpack(">I4s", picture[at : at + 8])
        data += picture[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += length + 12
    data = zlib.decompress(data)
    above = bytearray(size)
    for at in range(0, height * (size + 1), size + 1):
        kind, row = data[at], bytearray(data[at + 1 : at + 1 + size])
        for i in range(size if kind else 0):
            a, b, c = (row[i - 3], above[i], above[i - 3]) if i >= 3 else (0, above[i], 0)
            guess = a + b - c
            nearest = min((abs(guess - a), 0, a), (abs(guess - b), 1, b), (abs(guess - c), 2, c))[2]
            row[i] = (row[i] + (0, a, b, (a + b) // 2, nearest)[kind]) & 255
        yield bytes(row)
        above = row


def use(browser: webdriver.Chrome) -> None:
    """What an operator does in the console."""
    browser.find_element("id", "listen-channel").send_keys("deploys")
    browser.find_element("id", "toggle").click()
    _await(browser, "listening", "cursor")
    browser.find_element("id", "publish-channel").send_keys("deploys")
    field = browser.find_element("id", "data")
    for version in ("4.1.0", "4.1.1"):
        field.clear()
        field.send_keys(f'{{"service": "shop", "version": "{version}", "by": "ann"}}')
        browser.find_element("id", "send").click()
        _await(browser, "log", version)
    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")


def _await(browser: webdriver.Chrome, id: str, text: str) -> None:
    WebDriverWait(browser, PATIENCE_S).until(lambda _: text in browser.find_element("id", id).text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="how long there is load before [150]")
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes there are [3]")
    parser.add_argument("--to", type=Path, default=IMAGES, help="the folder of the pictures [docs/images]")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pushup-screenshots-") as folder:
        cluster = Cluster.up(Path(folder) / "cluster", nodes=given.nodes)
        try:
            with load(cluster.tcp, seed=5), chromium(folder) as browser:
                # The period of the picture is watched, so that it has a point for every second.
                browser.get(f"http://{cluster.nodes[0].admin_address}/")
                browser.find_element("css selector", "[name=range][value='120']").find_element("xpath", "..").click()
                time.sleep(given.seconds)
                use(browser)
                for name, view in VIEWS.items():
                    picture = shrink(look(browser, *view))
                    (given.to / f"{name}.png").write_bytes(picture)
                    print(f"{name}.png: {len(picture):,} bytes")
                    if len(picture) > BYTES_MAX:
                        raise SystemExit(f"{name}.png has more than {BYTES_MAX:,} bytes")
        finally:
            cluster.down()


if __name__ == "__main__":
    main()
