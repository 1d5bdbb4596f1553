"""The same subscriber at Nchan itself and at PushUp, which must see the same.

Ids are each server's own, and are sent back as Nchan's client does it. What differs on purpose is not compared here:
the idle answer for Nchan's client, and what it cannot be told (tests/test_nchan.py).
"""

import asyncio
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
import pytest

from loadtest.machine import Cores
from loadtest.servers import Nchan, ServerError
from tests.support import PATIENCE_S, running

CONF: Final = """\
load_module {module};
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{
    worker_connections {descriptors};
}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    nchan_shared_memory_size 32M;
    server {{
        listen {host}:{port};
        location ~ ^/pub/(.+)$ {{
            nchan_publisher;
            nchan_channel_id $1;
            nchan_message_buffer_length {messages};
            nchan_message_timeout {seconds}s;
        }}
        location ~ ^/sub/(.+)$ {{
            nchan_subscriber;
            nchan_channel_id $1;
            nchan_channel_id_split_delimiter ",";
            nchan_subscriber_timeout 1s;
        }}
        location ~ ^/batch/(.+)$ {{
            nchan_subscriber;
            nchan_channel_id $1;
            nchan_channel_id_split_delimiter ",";
            nchan_longpoll_multipart_response on;
        }}
        location = /status {{
            nchan_stub_status;
        }}
    }}
}}
"""

TEXT: Final = "text of\ntwo lines, ünïcödé 😀"
SAID: Final = (("text/plain", "one"), ("application/json", '{"n":2}'), ("text/plain", TEXT))
"""What is published: type and text."""


class Subject(ABC):
    """A server, and a session with it."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.session = session
        self.url = f"http://{address}"

    batch = "/sub"
    """Where a long poll gets several messages at once."""

    @abstractmethod
    async def publish(self, channel: str, kind: str, text: str) -> None: ...

    @abstractmethod
    async def close(self, channel: str) -> None: ...

    @abstractmethod
    async def waiting(self) -> None:
        """Return once a subscriber waits."""


class PushUp(Subject):
    parked: Callable[[], int]

    async def publish(self, channel: str, kind: str, text: str) -> None:
        body = {"channels": [channel], "data": text if kind == "text/plain" else json.loads(text)}
        async with self.session.post(f"{self.url}/publish", data=json.dumps(body, separators=(",", ":"))) as answer:
            assert answer.status == 201

    async def close(self, channel: str) -> None:
        async with self.session.delete(f"{self.url}/channels/{channel}") as answer:
            assert answer.status == 204

    async def waiting(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not self.parked():
                await asyncio.sleep(0.005)


class Nginx(Subject):
    batch = "/batch"

    async def publish(self, channel: str, kind: str, text: str) -> None:
        headers = {"Content-Type": kind}
        async with self.session.post(f"{self.url}/pub/{channel}", data=text.encode(), headers=headers) as answer:
            assert answer.status in (201, 202)

    async def close(self, channel: str) -> None:
        async with self.session.delete(f"{self.url}/pub/{channel}") as answer:
            assert answer.status == 200

    async def waiting(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while "\nsubscribers: 0\n" in await self._status():
                await asyncio.sleep(0.005)

    async def _status(self) -> str:
        async with self.session.get(f"{self.url}/status") as answer:
            return await answer.text()


@pytest.fixture
def nginx(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real Nchan."""
    monkeypatch.setattr("loadtest.servers.NGINX_CONF", CONF)
    try:
        Nchan.versions()
        cores = frozenset(os.sched_getaffinity(0))
        server = Nchan(Cores(cores, cores), 512)
        server.__enter__()
    except ServerError as error:
        pytest.skip(f"no Nchan to compare with: {error}")
    try:
        host, port = server.address
        yield f"{host}:{port}"
    finally:
        server.__exit__(None, None, None)


@asynccontextmanager
async def subjects(nginx: str) -> AsyncIterator[tuple[PushUp, Nginx]]:
    async with running(nchan="/sub", poll_timeout=1, heartbeat=60) as server, aiohttp.ClientSession() as session:
        pushup = PushUp(session, server.address)
        pushup.parked = lambda: server.node.parked
        yield pushup, Nginx(session, nginx)


def ids(answer: aiohttp.ClientResponse) -> dict[str, str]:
    """The fields that Nchan's client sends with its next poll."""
    names = {"Last-Modified": "If-Modified-Since", "Etag": "If-None-Match"}
    return {names[name]: answer.headers[name] for name in names if name in answer.headers}


async def poll(subject: Subject, target: str, headers: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """What a poll sees: status, type and text; and the ids for the next one."""
    async with subject.session.get(f"{subject.url}{target}", headers=headers) as answer:
        kind = answer.headers.get("Content-Type", "") if answer.status == 200 else ""
        return (answer.status, kind, await answer.text()), ids(answer)


async def walk(subject: Subject) -> Any:
    """One message after the other, one that has to be waited for, and the end of waiting."""
    seen: list[Any] = []
    have: dict[str, str] = {}
    for kind, text in SAID:
        await subject.publish("walk", kind, text)
    for _ in SAID:
        what, have = await poll(subject, "/sub/walk", {**have, "Accept": "text/plain"})
        seen.append(what)
    waiting = asyncio.create_task(poll(subject, "/sub/walk", {**have, "Accept": "text/plain"}))
    await subject.waiting()
    await subject.publish("walk", "text/plain", "last")
    what, have = await waiting
    seen.append(what)
    idle, _ = await poll(subject, "/sub/walk", {**have, "Accept": "text/plain"})
    return [*seen, idle]


async def deletion(subject: Subject) -> Any:
    """A channel that goes away while somebody waits."""
    await subject.publish("gone", "text/plain", "a")
    what, have = await poll(subject, "/sub/gone", {})
    waiting = asyncio.create_task(poll(subject, "/sub/gone", have))
    await subject.waiting()
    await subject.close("gone")
    return [what, (await waiting)[0]]


async def batch(subject: Subject) -> Any:
    """Several messages in one answer, read as Nchan's client reads them, and then one."""
    for kind, text in SAID:
        await subject.publish("batch", kind, text)
    (status, kind, text), have = await poll(subject, f"{subject.batch}/batch", {})
    boundary = re.fullmatch(r"multipart/mixed;\s+boundary=(.*)", kind)
    assert boundary is not None
    first, *parts, last = text.split(f"--{boundary[1]}")
    assert re.match(r"--\r?\n", last)
    read = []
    for part in parts:
        found = re.search(r"^(.*)\r?\n\r?\n([\s\S]*)\r?\n$", part, re.MULTILINE)
        assert found is not None
        header = re.match(r"Content-Type:\s+(.*?)\r?$", found[1])
        read.append((header and header[1], found[2].removesuffix("\r")))
    await subject.publish("batch", "application/json", "[4]")
    return [status, first, read, (await poll(subject, f"{subject.batch}/batch", have))[0]]


async def multiplexed(subject: Subject) -> Any:
    """Two channels by turns."""
    for number in range(4):
        await subject.publish("ab"[number % 2], "text/plain", str(number))
    seen: list[Any] = []
    have: dict[str, str] = {}
    for _ in range(4):
        what, have = await poll(subject, "/sub/a,b", {**have, "Accept": "text/plain"})
        seen.append(what)
    return seen


async def events(subject: Subject) -> Any:
    """What an EventSource makes of the stream, and again from the second message on."""
    for kind, text in SAID:
        await subject.publish("events", kind, text)
    whole = await _events(subject, "/sub/events", {}, 3)
    (second, _), rest = whole[1][1], []
    for target, headers in (
        (f"/sub/events?last_event_id={second}", {}),
        ("/sub/events", {"Last-Event-ID": second}),
    ):
        rest.append(_data(await _events(subject, target, headers, 1)))
    return [whole[0], _data(whole), rest]


async def _events(subject: Subject, target: str, headers: Mapping[str, str], count: int) -> tuple[Any, list[Any]]:
    """Status, type and first line; and the first events with their ids."""
    url = f"{subject.url}{target}"
    async with subject.session.get(url, headers={**headers, "Accept": "text/event-stream"}) as answer:
        found: list[tuple[str, str]] = []
        id, first = "", None
        data: list[str] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(found) < count:
                line = (await answer.content.readline()).decode().rstrip("\n")
                first = line if first is None else first
                field, _, value = line.partition(":")
                if line == "" and data:
                    found.append((id, "\n".join(data)))
                    data = []
                elif field == "id":
                    id = value.removeprefix(" ")
                elif field == "data":
                    data.append(value.removeprefix(" "))
        return (answer.status, answer.headers["Content-Type"], first), found


def _data(seen: tuple[Any, list[Any]]) -> list[str]:
    return [data for _, data in seen[1]]


async def frames(subject: Subject) -> Any:
    """Frames with id and type, without their ids; and again from the second message on."""
    for kind, text in SAID:
        await subject.publish("frames", kind, text)
    whole = await _frames(subject, "/sub/frames", ("ws+meta.nchan",), 3)
    ids = [re.match(r"id: (.*)\n", frame)[1] for frame in whole[1]]  # type: ignore[index]
    rest = await _frames(subject, f"/sub/frames?last_event_id={ids[1]}", ("ws+meta.nchan",), 1)
    bare = await _frames(subject, "/sub/frames", (), 3)
    return [whole[0], [re.sub("^id: .*", "id: X", frame) for frame in (*whole[1], *rest[1])], bare]


async def _frames(
    subject: Subject, target: str, protocols: tuple[str, ...], count: int
) -> tuple[str | None, list[str]]:
    async with subject.session.ws_connect(f"{subject.url}{target}", protocols=protocols) as socket:
        return socket.protocol, [await socket.receive_str(timeout=PATIENCE_S) for _ in range(count)]


CONVERSATIONS: Final[Mapping[str, tuple[Any, Any]]] = {
    "walk": (walk, [*((200, *said) for said in SAID), (200, "text/plain", "last"), (408, "", "")]),
    "deletion": (deletion, [(200, "text/plain", "a"), (410, "", "")]),
    "batch": (batch, [200, "", list(SAID), (200, "application/json", "[4]")]),
    "multiplexed": (multiplexed, [(200, "text/plain", str(number)) for number in range(4)]),
    "events": (
        events,
        [(200, "text/event-stream; charset=utf-8", ": hi"), [text for _, text in SAID], [[TEXT], [TEXT]]],
    ),
    "frames": (
        frames,
        [
            "ws+meta.nchan",
            [f"id: X\ncontent-type: {kind}\n\n{text}" for kind, text in (*SAID, SAID[2])],
            (None, [text for _, text in SAID]),
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_both_servers_say_the_same(name: str, nginx: str) -> None:
    """And it is what a subscriber hopes for."""
    converse, hoped = CONVERSATIONS[name]
    async with subjects(nginx) as (pushup, real):
        ours, theirs = await converse(pushup), await converse(real)

    assert ours == hoped
    assert theirs == hoped
