"""The question board in a real Chromium, for tests of whoever serves it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from tests.support import PATIENCE_S

PROGRAMS: Final = {"chromium": Path("/usr/bin/chromium"), "chromium-driver": Path("/usr/bin/chromedriver")}
"""What drives these tests, by the Debian package it comes in."""

CHROMIUM_FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

READ_LIST: Final = """\
return Array.from(document.querySelectorAll("#questions > li"), (item) => ({
    id: item.dataset.id,
    note: item.dataset.note,
    author: item.querySelector(".author")?.textContent,
    text: item.querySelector(".text")?.textContent,
    matched: Array.from(item.querySelectorAll("[data-channel]"), (chip) => chip.dataset.channel),
    others: Array.from(item.querySelectorAll("[data-follow]"), (chip) => chip.dataset.follow),
}))"""


class Page:
    """One window with the board. Every look and touch turns to that window first."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self._browser = browser
        browser.switch_to.new_window("window")
        self._window = browser.current_window_handle

    @property
    def browser(self) -> webdriver.Chrome:
        if self._browser.current_window_handle != self._window:
            self._browser.switch_to.window(self._window)
        return self._browser

    def open(self, address: str, *channels: str) -> None:
        """Show the board at HOST:PORT, following these channels or the default ones, and wait for its first poll."""
        fragment = "#" + urlencode([("channel", channel) for channel in channels]) if channels else ""
        self.browser.get(f"http://{address}/{fragment}")
        self.until(lambda: self.text("request") != "", "hoped for a poll")

    def text(self, id: str) -> str:
        return self.browser.find_element("id", id).text

    def click(self, selector: str) -> None:
        self.browser.find_element("css selector", selector).click()

    def fill(self, id: str, text: str) -> None:
        field = self.browser.find_element("id", id)
        field.clear()
        field.send_keys(text)

    def ask(self, author: str, question: str, tags: str = "") -> None:
        """Fill in the form and send it."""
        self.fill("author", author)
        self.fill("question", question)
        self.fill("tags", tags)
        self.click("#publish")

    def entries(self) -> list[dict[str, Any]]:
        """Questions and notes, from the oldest to the newest."""
        shown: list[dict[str, Any]] = self.browser.execute_script(READ_LIST)
        return shown[::-1]

    def lines(self) -> list[str]:
        """Every question's text, and every note's kind in brackets."""
        return [f"[{item['note']}]" if item["note"] else item["text"] for item in self.entries()]

    def complaints(self) -> list[Any]:
        """What the browser's console has to say, such as breaches of the policy."""
        return list(self.browser.get_log("browser"))  # type: ignore[no-untyped-call]

    def until(self, condition: Callable[[], bool], hope: str) -> None:
        WebDriverWait(self.browser, PATIENCE_S, 0.02).until(
            lambda _: condition(), f"{hope}; shown: {self.lines()}, wire: {self.text('wire')!r}"
        )

    def until_lines(self, *lines: str) -> None:
        """Wait for the last of these to appear; then they are all there is, in this order."""
        self.until(lambda: lines[-1] in self.lines(), f"hoped for {lines[-1]!r}")
        assert self.lines() == list(lines)

    def until_state(self, state: str) -> None:
        self.until(lambda: self._attribute("state", "data-state") == state, f"hoped to be {state}")

    def until_outcome(self, outcome: str) -> None:
        self.until(lambda: self._attribute("outcome", "data-outcome") == outcome, f"hoped for {outcome}")

    def _attribute(self, id: str, name: str) -> str | None:
        return self.browser.find_element("id", id).get_attribute(name)

    @contextmanager
    def offline(self) -> Iterator[None]:
        """Cut this window, and no other, off the network."""
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.browser.execute_cdp_cmd("Network.enable", {})
        self.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
        try:
            self.until_state("offline")
            yield
        finally:
            self.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser with a profile of its own for all these tests, as its start is what takes long."""
    for package, path in PROGRAMS.items():
        if not path.exists():
            pytest.fail(f"{path} is missing: install it (Debian: apt install {package})", pytrace=False)
    options = Options()
    options.binary_location = str(PROGRAMS["chromium"])
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(str(PROGRAMS["chromium-driver"])))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def pages(chromium: webdriver.Chrome) -> Iterator[Callable[[], Page]]:
    """Opens windows, and closes them after the test."""
    home = chromium.current_window_handle
    yield lambda: Page(chromium)
    for window in chromium.window_handles:
        if window != home:
            chromium.switch_to.window(window)
            chromium.close()
    chromium.switch_to.window(home)


@pytest.fixture
def page(pages: Callable[[], Page]) -> Page:
    return pages()
