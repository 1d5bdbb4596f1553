"""The recipes: the code that stands in each page, in the framework it is for, with a real node."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from aiohttp import ClientSession, web

from pushup import AsyncHttpPublisher, Client
from pushup.access import hash_key
from pushup.errors import Forbidden
from pushup.server import Server
from tests import browser
from tests.browser import Page
from tests.support import PATIENCE_S, parked, running

chromium, pages, page = browser.chromium, browser.pages, browser.page

PAGES: Final = Path(__file__).parent.parent / "docs/recipes"
KEY: Final = "pushup_" + "k" * 43
SECRET: Final = "s" * 40

BLOCK: Final = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.M | re.S)

DJANGO: Final = """
from pathlib import Path
import django
from django.conf import settings
from django.core.management import call_command
settings.configure(
    ROOT_URLCONF="rooms.urls",
    SECRET_KEY="x",
    ALLOWED_HOSTS=["testserver"],
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions", "rooms"],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "posts.db"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()
call_command("migrate", run_syncdb=True, verbosity=0)
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from rooms.push import publisher
client = Client()
refused = [client.get("/rooms/blue").status_code, client.post("/rooms/blue/posts", {"text": "no"}).status_code]
client.force_login(User.objects.create(username="ann"))
posted = [client.post("/rooms/blue/posts", {"text": text}) for text in TEXTS]
token = client.get("/rooms/blue/token").json()["token"]
page, posts = client.get("/rooms/blue").content.decode(), client.get("/rooms/blue/posts").json()
results = [(post.status_code, post.json()) for post in posted]
say(refused=refused, posted=results, token=token, page=page, posts=posts)
publisher.close()
connection.close()
"""

FLASK: Final = """
from app import app, publisher
client = app.test_client()
refused = [client.get("/rooms/blue").status_code, client.post("/rooms/blue/posts", data={"text": "no"}).status_code]
with client.session_transaction() as session:
    session["user"] = "ann"
posted = [client.post("/rooms/blue/posts", data={"text": text}) for text in TEXTS]
token = client.get("/rooms/blue/token").json["token"]
page, posts = client.get("/rooms/blue").text, client.get("/rooms/blue/posts").json
say(refused=refused, posted=[(post.status_code, post.json) for post in posted], token=token, page=page, posts=posts)
publisher.close()
"""

FASTAPI: Final = """
from app import app, current_user
from fastapi.testclient import TestClient
with TestClient(app) as client:
    refused = [
        client.get("/rooms/blue/posts").status_code,
        client.post("/rooms/blue/posts", json={"text": "no"}).status_code,
    ]
    app.dependency_overrides[current_user] = lambda: "ann"
    posted = [client.post("/rooms/blue/posts", json={"text": text}) for text in TEXTS]
    token = client.get("/rooms/blue/token").json()["token"]
    page, posts = client.get("/rooms/blue").text, client.get("/rooms/blue/posts").json()
    results = [(post.status_code, post.json()) for post in posted]
    say(refused=refused, posted=results, token=token, page=page, posts=posts)
"""

DRIVERS: Final = {"django": DJANGO, "flask": FLASK, "fastapi": FASTAPI}
TEXTS: Final = ["Hello", "</script><b>é"]

HEAD: Final = f"""
import json, sys
sys.path.insert(0, "")
TEXTS = {TEXTS!r}
def say(**said):
    print(json.dumps(said))
"""


def blocks(page: Path) -> dict[str, str]:
    """The files that a page shows, by name."""
    return dict(BLOCK.findall(page.read_text()))


def use(recipe: str, folder: Path, url: str) -> dict[str, Any]:
    """Do in the framework's test client what users do; what came of it."""
    environment = {"PUSH_URL": url, "PUSH_KEY": KEY, "PUSH_SECRET": SECRET, "SECRET_KEY": "x"}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + DRIVERS[recipe]],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def unpack(recipe: str, folder: Path) -> Path:
    """Write the page's files; the access file, with the hash of the test's key."""
    for name, text in blocks(PAGES / f"{recipe}.md").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("sha256:…", hash_key(KEY)))
    (folder / "token.secret").write_text(SECRET)
    access = folder / "access.toml"
    access.write_text(access.read_text().replace('"token.secret"', f'"{folder / "token.secret"}"'))
    return access


@pytest.mark.parametrize("recipe", DRIVERS)
async def test_who_listens_gets_what_was_stored(recipe: str, tmp_path: Path) -> None:
    """With the token that the application gave, exactly the posts that it has stored."""
    async with running(access=unpack(recipe, tmp_path)) as server:
        url = f"http://{server.address}"
        said = await asyncio.to_thread(use, recipe, tmp_path, url)
        async with Client(url, token=said["token"]) as client, asyncio.timeout(PATIENCE_S):
            news = client.subscribe("room.blue", start=0)
            got = [(await anext(news)).data for _ in TEXTS]
            with pytest.raises(Forbidden):
                await anext(client.subscribe("room.red"))

    assert [status in (302, 401) for status in said["refused"]] == [True, True]
    posts = [{"number": number, "author": "ann", "text": text} for number, text in enumerate(TEXTS, 1)]
    assert said["posted"] == [[201, post] for post in posts]
    assert got == said["posts"] == posts
    assert jwt.decode(said["token"], SECRET, ["HS256"])["sub"] == "ann"


@pytest.mark.parametrize("recipe", DRIVERS)
def test_without_pushup_posts_are_stored(recipe: str, tmp_path: Path) -> None:
    """The application answers as ever, and has for its pages what no message told of."""
    unpack(recipe, tmp_path)

    said = use(recipe, tmp_path, "http://127.0.0.1:1")

    assert [status for status, _ in said["posted"]] == [201, 201]
    assert [post["text"] for post in said["posts"]] == TEXTS


READ: Final = "return Array.from(document.querySelectorAll('#posts > li'), (item) => item.textContent)"


@asynccontextmanager
async def fronted(server: Server, said: Mapping[str, Any]) -> AsyncIterator[str]:
    """One origin, as a proxy makes it: the node's paths, and what the application answered."""

    async def node(request: web.Request) -> web.Response:
        headers = {name: request.headers[name] for name in ("Authorization",) if name in request.headers}
        async with session.get(f"http://{server.address}{request.path_qs}", headers=headers) as answer:
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)

    async def application(request: web.Request) -> web.Response:
        match request.path.removeprefix("/rooms/blue"):
            case "/token":
                return web.json_response({"token": said["token"]})
            case "/posts":
                return web.json_response(said["posts"])
            case "":
                return web.Response(text=said["page"], content_type="text/html")
            case _:
                return web.Response(status=204)

    app = web.Application()
    app.router.add_get("/poll", node)
    app.router.add_get("/pushup.js", node)
    app.router.add_get("/{rest:.*}", application)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    async with ClientSession() as session:
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@pytest.mark.browser
@pytest.mark.parametrize("recipe", DRIVERS)
async def test_the_page_shows_each_post_once(recipe: str, tmp_path: Path, page: Page) -> None:
    """In a real browser: those that were stored, one of which PushUp tells of as well, and then what is new."""
    new = {"number": 3, "author": "bob", "text": "Later"}
    shown: list[str] = []

    def look() -> bool:
        shown[:] = page.browser.execute_script(READ)
        return len(shown) > len(TEXTS)

    async with running(access=unpack(recipe, tmp_path)) as server:
        said = await asyncio.to_thread(use, recipe, tmp_path, f"http://{server.address}")
        async with (
            fronted(server, said) as origin,
            AsyncHttpPublisher(f"http://{server.address}", KEY) as publisher,
            asyncio.timeout(PATIENCE_S),
        ):
            await asyncio.to_thread(page.browser.get, f"{origin}/rooms/blue")
            await parked(server, 1)
            for post in (said["posts"][1], new):
                await publisher.publish("room.blue", post)
            while not await asyncio.to_thread(look):
                await asyncio.sleep(0.02)
            await asyncio.to_thread(page.browser.get, "about:blank")

    assert shown == ["ann: Hello", "ann: </script><b>é", "bob: Later"]
    assert page.complaints() == []


@pytest.mark.parametrize("recipe", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_every_recipe_has_a_driver(recipe: Path) -> None:
    """One that no test runs is none."""
    assert recipe.stem in DRIVERS
    assert len(blocks(recipe)) >= 3
