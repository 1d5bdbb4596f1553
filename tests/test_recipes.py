"""The recipes: the code that stands in each page, in the framework it is for, with a real node."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import jwt
import pytest

from pushup import Client
from pushup.access import hash_key
from pushup.errors import Forbidden
from tests.support import PATIENCE_S, running

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
page = client.get("/rooms/blue").content.decode()
say(refused=refused, posted=[(post.status_code, post.json()) for post in posted], token=token, page=page)
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
page = client.get("/rooms/blue").text
say(refused=refused, posted=[(post.status_code, post.json) for post in posted], token=token, page=page)
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
    page = client.get("/rooms/blue").text + client.get("/rooms/blue/posts").text
    say(refused=refused, posted=[(post.status_code, post.json()) for post in posted], token=token, page=page)
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
    environment = {"PUSHUP_URL": url, "PUSHUP_KEY": KEY, "PUSHUP_SECRET": SECRET, "SECRET_KEY": "x"}
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
    """With the token that the application gave, from the cursor in the page, exactly the posts it has stored."""
    async with running(access=unpack(recipe, tmp_path)) as server:
        url = f"http://{server.address}"
        said = await asyncio.to_thread(use, recipe, tmp_path, url)
        (start,) = (int(number) for number in re.findall(r'\bstart"?: ?(\d{16})\b', said["page"]))
        gaps: list[int] = []
        async with Client(url, token=said["token"]) as client, asyncio.timeout(PATIENCE_S):
            news = client.subscribe("room.blue", start=start, on_gap=gaps.append)
            got = [(await anext(news)).data for _ in TEXTS]
            with pytest.raises(Forbidden):
                await anext(client.subscribe("room.red"))

    assert [status in (302, 401) for status in said["refused"]] == [True, True]
    posts = [{"number": number, "author": "ann", "text": text} for number, text in enumerate(TEXTS, 1)]
    assert said["posted"] == [[201, post] for post in posts]
    assert got == posts
    assert start < time.time() * 1_000_000
    assert jwt.decode(said["token"], SECRET, ["HS256"])["sub"] == "ann"


@pytest.mark.parametrize("recipe", DRIVERS)
def test_without_pushup_posts_are_stored(recipe: str, tmp_path: Path) -> None:
    """The application answers as ever, and the page has what no message told of, safely written."""
    unpack(recipe, tmp_path)

    said = use(recipe, tmp_path, "http://127.0.0.1:1")

    assert [status for status, _ in said["posted"]] == [201, 201]
    assert "Hello" in said["page"]
    assert said["page"].count("</script>") == (1 if recipe != "fastapi" else 2) + (recipe == "django")


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_every_page_has_a_driver(page: Path) -> None:
    """A recipe that no test runs is none."""
    assert page.stem in DRIVERS
    assert len(blocks(page)) >= 3
