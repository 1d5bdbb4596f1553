"""The documentation site: it builds, it holds what it promises, and its commands do what the pages say."""

import ast
import asyncio
import configparser
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pushup.access import hash_key, parse_access
from pushup.cli import make_parser
from pushup.errors import PushUpError, SettingsError
from pushup.settings import FIELDS, load
from tests.browser import chromium
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S, connected, parked, running

__all__ = ["chromium"]

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = ROOT / "docs"
START_S: Final = 60.0

# --- what the pages hold

_MARK: Final = re.compile(r"<!-- (run|prints|check)(?:: (.*))? -->")
_FENCE: Final = re.compile(r"( *)```(\w*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the comment before it, which says what a test does with it."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """All fenced blocks of all pages."""
    found = []
    for path in sorted(DOCS.rglob("*.md")):
        lines = path.read_text().splitlines()
        at = 0
        while at < len(lines):
            fence = _FENCE.match(lines[at])
            if fence is None:
                at += 1
                continue
            indent, language = fence.groups()
            end = next(end for end in range(at + 1, len(lines)) if lines[end].strip() == "```")
            text = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end])
            mark = _MARK.fullmatch(lines[at - 1].strip()) if at else None
            kind, detail = mark.groups() if mark else ("", "")
            found.append(Block(str(path.relative_to(DOCS)), at + 1, language, text, kind, detail or ""))
            at = end + 1
    return found


def _parse_shell(text: str) -> None:
    done = subprocess.run(["/bin/bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr


def _parse_ini(text: str) -> None:
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(text)


def _parse_python(text: str) -> None:
    compile(text, "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


PARSERS: Final[dict[str, Callable[[str], object]]] = {
    "sh": _parse_shell,
    "python": _parse_python,
    "json": lambda text: [
        json.loads(part) for part in (text.splitlines() if text.startswith('{"messages":[{') else [text])
    ],
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "ini": _parse_ini,
}
IN_A_BROWSER: Final = ("js", "html")
IN_A_PROXY: Final = ("haproxy", "nginx")

BLOCKS: Final = blocks()


def of(*languages: str) -> pytest.MarkDecorator:
    """A parameter: the blocks in these languages."""
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in languages], ids=str)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_its_language(block: Block) -> None:
    """A block is in a language that some test reads, or it is text."""
    assert block.language in {"text", *PARSERS, *IN_A_BROWSER, *IN_A_PROXY}


@of(*PARSERS)
def test_every_block_parses(block: Block) -> None:
    """What readers copy is at least well-formed."""
    PARSERS[block.language](block.text)


@of("python")
def test_what_is_imported_from_pushup_exists(block: Block) -> None:
    """Every name of the package that a page uses is there."""
    import pushup

    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pushup":
            assert hasattr(pushup, node.attr), f"pushup.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "pushup":
            assert all(hasattr(pushup, name.name) for name in node.names)


def commands() -> list[tuple[str, list[str]]]:
    """Each call of the command in a shell block, by its place."""
    found = []
    for block in (block for block in BLOCKS if block.language == "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith(("pushup ", ".venv/bin/pushup ")):
                words = shlex.split(line.partition(">")[0], comments=True)
                found.append((str(block), words[1:]))
    return found


@pytest.mark.parametrize(("place", "words"), commands(), ids=lambda value: value if isinstance(value, str) else None)
def test_every_command_is_one(place: str, words: list[str]) -> None:
    """Commands, flags and the values of settings are those there are."""
    parsed = vars(make_parser().parse_args(words))
    if parsed["command"] == "serve":
        load({name: parsed[name] for name in FIELDS if parsed[name] is not None}, {})


@of("toml")
def test_every_file_is_one(block: Block, tmp_path: Path) -> None:
    """What pages show of settings and access files is good in one."""
    if "realms" in block.text:
        assert parse_access(block.text.replace("sha256:…", hash_key("pushup_one")), "access.toml")
    else:
        file = tmp_path / "pushup.toml"
        file.write_text(block.text)
        load({}, {}, file)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate and its key in one file."""
    made = tmp_path_factory.mktemp("certificate") / "push.pem"
    subprocess.run(["/bin/sh", ROOT / "compose/haproxy/certificate.sh", made], check=True, capture_output=True)
    return made


@of("haproxy")
def test_haproxy_accepts_what_we_say(block: Block, certificate: Path, tmp_path: Path) -> None:
    """The configuration is complete and right, but for the addresses."""
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "haproxy is missing: install it (Debian: apt install haproxy)"
    file = tmp_path / "haproxy.cfg"
    file.write_text(block.text.replace("/etc/ssl/push.pem", str(certificate)) + "\n")
    done = subprocess.run([program, "-c", "-f", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


@of("nginx")
def test_nginx_accepts_what_we_say(block: Block, certificate: Path, tmp_path: Path) -> None:
    """The configuration is right inside `http`, where there is an nginx to ask."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    site = block.text.replace("/etc/ssl/push.pem", str(certificate))
    file = tmp_path / "nginx.conf"
    file.write_text(f"pid {tmp_path}/pid; error_log stderr; events {{}}\nhttp {{ access_log off;\n{site}\n}}\n")
    done = subprocess.run([program, "-t", "-c", file, "-p", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


RUN_MODULE: Final = """\
const script = document.createElement("script");
script.type = "module";
script.textContent = arguments[0];
document.body.append(script);"""

_IMPORT: Final = re.compile(r'^ *import \{ (.*) \} from ".*"$', re.M)
_TEMPLATE: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}")
_SCRIPT: Final = re.compile(r"<script type=\"module\">(.*?)</script>", re.S)


@pytest.mark.browser
def test_every_script_parses(chromium: webdriver.Chrome) -> None:
    """A browser finds no error of syntax in what pages show of JavaScript, whether alone or in HTML."""
    for block in (block for block in BLOCKS if block.language in IN_A_BROWSER):
        for script in _SCRIPT.findall(block.text) if block.language == "html" else [block.text]:
            body = _IMPORT.sub(r"const { \1 } = {}", _TEMPLATE.sub("0", script))
            error = chromium.execute_script(
                "try { new Function('return async () => {' + arguments[0] + '\\n}') } catch (e) { return String(e) }",
                body,
            )
            assert error is None, f"{block}: {error}"


# --- commands that are run


@dataclass
class Terminal:
    """One command and what it has printed so far."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text()

    def until(self, pattern: str, patience: float = PATIENCE_S) -> str:
        """What matches, once the output does."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.text):
                return match.group()
            time.sleep(0.02)
        raise AssertionError(f"hoped for {pattern!r} of {self.process.args!r}, which printed {self.text!r}")


@dataclass
class Desk:
    """The terminals of somebody who follows a page, in a clone."""

    directory: Path
    addresses: dict[str, str] = field(default_factory=dict)
    terminals: list[Terminal] = field(default_factory=list)

    def open(self, command: str) -> Terminal:
        for told, true in self.addresses.items():
            command = command.replace(told, true)
        output = self.directory / f"terminal-{len(self.terminals)}"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PUSHUP_")},
            "PUSHUP_LISTEN": "127.0.0.1:0",
            "PUSHUP_ADMIN_LISTEN": "127.0.0.1:0",
            # The virtual environment is there; nothing is installed into it in the middle of a test.
            "MAKEFLAGS": "--old-file=.venv/.run --old-file=.venv/bin/python",
        }
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["/bin/bash", "-c", command], cwd=ROOT, env=environment, stdout=file, start_new_session=True
            )
        self.terminals.append(Terminal(process, output))
        return self.terminals[-1]

    def close(self) -> None:
        for terminal in reversed(self.terminals):
            if terminal.process.poll() is None:
                os.killpg(terminal.process.pid, signal.SIGINT)
                try:
                    terminal.process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(terminal.process.pid, signal.SIGKILL)
                    terminal.process.wait()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    try:
        yield desk
    finally:
        desk.close()


def _pattern(shown: str) -> str:
    """What a page shows, as a pattern for what there must be: times are those of the test."""
    return r"\A" + re.sub(r"\d{16}", r"\\d{16}", re.escape(shown)) + r"\s*\Z"


def test_the_quick_start_does_what_it_says(desk: Desk) -> None:
    """Each marked command of the page is run in its order, against the node that its first one starts."""
    assert shutil.which("make"), "make is missing"
    assert shutil.which("curl"), "curl is missing: install it (Debian: apt install curl)"
    marked = [block for block in BLOCKS if block.page == "quick-start.md" and block.mark]
    shell = [block for block in BLOCKS if block.page == "quick-start.md" and block.language == "sh"]
    assert [block for block in marked if block.mark == "run"] == shell, "every command of the quick start is run"
    background: Terminal | None = None
    front: Terminal | None = None
    for block, following in zip(marked, [*marked[1:], None], strict=True):
        if block.mark == "run" and block.detail.startswith("in the background"):
            background = desk.open(block.text)
            if "until" in block.detail:
                background.until(block.detail.partition('"')[2].rstrip('"'), START_S)
                address = background.until(r"polls and publications +http://[0-9.]+:\d+").split("//")[1]
                admin = background.until(r"health and metrics +http://[0-9.]+:\d+").split("//")[1]
                desk.addresses = {"localhost:8080": address, "localhost:8081": admin}
        elif block.mark == "run":
            front = desk.open(block.text)
            assert front.process.wait(PATIENCE_S) == 0, f"{block}: {front.text}"
            if block.detail == "until it prints so":
                assert following is not None
                deadline = time.monotonic() + PATIENCE_S
                while not re.search(_pattern(following.text), front.text) and time.monotonic() < deadline:
                    front = desk.open(block.text)
                    front.process.wait(PATIENCE_S)
        elif block.mark == "prints":
            terminal = background if block.detail else front
            assert terminal is not None
            terminal.until(_pattern(block.text))


@pytest.mark.browser
async def test_the_page_of_the_quick_start_shows_what_is_published(chromium: webdriver.Chrome) -> None:
    """Both scripts of the page, without the client and with it, hear of a publication in a real browser."""
    plain, page = (block.text for block in BLOCKS if block.page == "quick-start.md" and block.language in IN_A_BROWSER)
    (module,) = _SCRIPT.findall(page)
    logged = "console.log = (text) => document.body.append(`logged ${text}`)"

    async with running() as server, connected(server) as client:
        await asyncio.to_thread(chromium.get, f"http://{server.address}/openapi.json")
        await asyncio.to_thread(chromium.execute_script, RUN_MODULE, f"{logged}\n{plain}")
        await parked(server, 1)
        await asyncio.to_thread(chromium.execute_script, RUN_MODULE, module)
        await parked(server, 2)
        await client.publish("news", data="It works")
        await asyncio.to_thread(
            WebDriverWait(chromium, PATIENCE_S, 0.02).until,
            lambda browser: browser.execute_script("return document.body.innerText").count("It works") == 2,
        )
        await asyncio.to_thread(chromium.get, "about:blank")


async def test_the_steps_of_access_do_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the page's access file its key publishes, its token polls what it names, and strangers do neither."""
    monkeypatch.chdir(tmp_path)
    first, second, *_ = (block.text for block in BLOCKS if block.page == "access.md" and block.language == "sh")
    (token,) = (block.text for block in BLOCKS if block.page == "access.md" and block.language == "python")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = await asyncio.to_thread(
        subprocess.run, ["/bin/bash", "-ec", f"{first}\n{second}"], env={"PATH": path}, capture_output=True, check=True
    )
    key = done.stderr.decode().split()[-1]
    names: dict[str, Any] = {}
    exec(token, names)  # noqa: S102
    own, foreign = "/poll?channel=user.42.inbox&timeout=0", "/poll?channel=user.43.inbox&timeout=0"
    bearer = f"Authorization: Bearer {names['make_token']('42')}\r\n"

    async with running(access="access.toml") as server, connected(server) as client:
        message = {"channels": ["user.42.inbox"], "data": "hello"}
        published = await client.request("POST", "/publish", message, f"Authorization: Bearer {key}\r\n")
        refused = await client.request("POST", "/publish", message)
        polled = await client.request("GET", own, headers=bearer)
        stranger = await client.get(own)
        beyond = await client.request("GET", foreign, headers=bearer)

    assert (published.status, refused.status) == (201, 401)
    assert (polled.status, stranger.status, beyond.status) == (200, 401, 403)
    assert [message["data"] for message in polled.json["messages"]] == ["hello"]


async def test_what_is_published_straight_into_redis_arrives(redis_server: RedisServer) -> None:
    """The page's calls, by redis-cli and from Python, are messages as any others."""
    shell, *_ = (block.text for block in BLOCKS if block.page == "publish-redis.md" and block.language == "sh")
    program, *_ = (block.text for block in BLOCKS if block.page == "publish-redis.md" and block.language == "python")
    shell = shell.replace("redis-cli", f"redis-cli -p {redis_server.port}").replace("{default}", "{docs}")
    program = program.replace('"redis://localhost"', f'"{redis_server.url}", realm="docs"')

    async with running(broker=redis_server.url, realm="docs") as server, connected(server) as client:
        done = await asyncio.to_thread(subprocess.run, ["/bin/bash", "-ec", shell], capture_output=True, check=True)
        await asyncio.to_thread(exec, program, {})
        polled = await client.get("/poll?channel=news&timeout=0")

    messages = polled.json["messages"]
    assert [message["data"] for message in messages] == [
        *({"headline": headline} for headline in ("It works", "Once", "It works")),
        *range(1000),
    ][-len(messages) :]
    assert len(messages) == 1000, "the window has room for the latest"
    assert len(done.stdout.split()) == 2, "redis-cli says the ids"


# --- the site


class Document(HTMLParser):
    """What a built page refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.text = io.StringIO()
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and not {"canonical", "prev", "next"} & set(values.get("rel", "").split()):
            self.loads.append(values["href"])
        if tag != "a":
            self.loads += [values[name] for name in ("src", "srcset", "data", "poster", "xlink:href") if name in values]
        if "url(" in values.get("style", ""):
            self.loads.append(values["style"])

    def handle_data(self, data: str) -> None:
        self.text.write(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as can be. Nothing in it needs a network."""
    made = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", made],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return made


@pytest.fixture(scope="module")
def documents(site: Path) -> dict[str, Document]:
    """All pages, by path below the site."""
    return {str(path.relative_to(site)): Document(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_in_the_navigation(site: Path, documents: dict[str, Document]) -> None:
    """Who begins at the start can find each page."""
    linked = {urlsplit(urljoin("/", link)).path.lstrip("/") for link in documents["index.html"].links}
    pages = {path.removesuffix("index.html") for path in documents} - {"404.html", ""}
    assert pages <= linked


def test_every_link_within_the_site_leads_somewhere(site: Path, documents: dict[str, Document]) -> None:
    """Pages, files and anchors exist, also in what hooks and other files brought in."""
    broken = []
    for path, document in documents.items():
        for link in document.links:
            url = urlsplit(urljoin(f"/{path}", link))
            if url.scheme in ("http", "https", "mailto") or path == "404.html":
                continue
            target = unquote(url.path).lstrip("/")
            target += "index.html" if target == "" or target.endswith("/") else ""
            if not (site / target).is_file():
                broken.append(f"{path}: {link}")
            elif url.fragment and target in documents and unquote(url.fragment) not in documents[target].ids:
                broken.append(f"{path}: {link}: no such anchor")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: Path, documents: dict[str, Document]) -> None:
    """Fonts, scripts, styles and images are the site's own: who reads it tells nobody else."""
    outside = re.compile(r"(https?:)?//", re.I)
    for path, document in documents.items():
        assert not [load for load in document.loads if outside.match(load)], path
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s*)['\"]?(https?:)?//", style.read_text()), style


def test_every_setting_is_explained(documents: dict[str, Document]) -> None:
    """Each has a line of its own to link to, with the words of `--help`."""
    page = documents["reference/settings/index.html"]
    for name, setting in FIELDS.items():
        assert name in page.ids
        assert setting.description in page.text.getvalue()


def codes(error: type[PushUpError] = PushUpError) -> Iterator[str]:
    if error is not SettingsError:
        yield error.code
    for child in error.__subclasses__():
        yield from codes(child)


def test_every_error_code_is_explained(documents: dict[str, Document]) -> None:
    """Each has a line to link to in the reference, and a remedy among the symptoms."""
    reference, symptoms = documents["reference/errors/index.html"], documents["troubleshooting/index.html"]
    for code in codes():
        assert code in reference.ids
        assert re.search(rf"\b{code}\b", symptoms.text.getvalue()), code


def test_every_operation_is_explained(documents: dict[str, Document]) -> None:
    """The reference has what the API's description has."""
    api = json.loads((ROOT / "pushup/openapi.json").read_text())
    page = documents["reference/http/index.html"]
    for item in api["paths"].values():
        for method, operation in item.items():
            if method != "parameters":
                assert operation["operationId"] in page.ids
                assert operation["summary"] in page.text.getvalue()
    for name in api["components"]["schemas"]:
        assert f"shape-{name.lower()}" in page.ids


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The site at an address of this machine."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.browser
def test_a_reader_finds_things(site: Path, chromium: webdriver.Chrome) -> None:
    """In a real browser the search finds a symptom, and pages ask no other server for anything."""
    with served(site) as url:
        chromium.get(f"{url}/")
        # Results are drawn anew while they are looked at.
        found = WebDriverWait(chromium, PATIENCE_S, 0.05, [NoSuchElementException, StaleElementReferenceException])
        chromium.execute_script("document.getElementById('__search').click()")
        field = found.until(lambda browser: browser.find_element(By.CSS_SELECTOR, "input.md-search__input"))
        found.until(lambda _: field.is_displayed())
        field.send_keys("seventh tab")
        found.until(
            lambda browser: any(
                "proxies" in (item.get_attribute("href") or "")
                for item in browser.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
            )
        )
        loaded = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert loaded
        assert all(name.startswith((url, "data:", "blob:")) for name in loaded), loaded
        chromium.get("about:blank")
