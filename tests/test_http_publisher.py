"""Publishing over HTTP: the interface of the publishers for Redis, and what may be repeated."""

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pushup import AsyncHttpPublisher, AsyncPublisher, HttpPublisher, Publisher
from pushup.access import hash_key
from pushup.errors import (
    Forbidden,
    InvalidParameter,
    KeyReused,
    PushUpError,
    RealmFull,
    TooLarge,
    TooManyPublications,
    Unauthorized,
    Unavailable,
)
from pushup.messages import Receipt
from tests.redis_server import RedisServer
from tests.stub_server import PUBLISHERS, Answer, Either, answer, either, problem, stub
from tests.support import PATIENCE_S, connected, eventually, running

KEY = "pushup_" + "k" * 43
UNKNOWN = ", so this may have been done or not"

both = pytest.mark.parametrize("make", PUBLISHERS)

ITEMS: list[Any] = [
    {"channels": "a", "data": {"é": [1, None, 2.5]}},
    {"channels": ["a", "b c"], "data": None, "key": "k1"},
    {"channels": ["b c", "a", "a"], "data": float("nan")},
    {"channels": ["a", "b c"], "data": None, "key": "k1"},
    {"channels": ["a"], "data": "another", "key": "k1"},
    {"channels": [], "data": 1},
    {"channels": ["a"]},
    {"channels": ["a"], "data": 1, "kee": 2},
    {"channels": ["a\n"], "data": 1},
    {"channels": ["a"], "data": {1j: 2}},
    {"channels": ["a", 17], "data": 1},
    {"channels": [17], "data": 1},
    {"channels": ["a"], "data": "x" * 70_000},
    {"channels": ["a"], "data": 1, "key": ""},
    {"channels": ["a"], "data": 1, "key": "é\ud800"},
    {"channels": ["a"], "data": "é\n\0\u2028</script>"},
    "a",
]


async def refusal(publisher: Either, *arguments: Any, **options: Any) -> PushUpError:
    with pytest.raises(PushUpError) as caught:
        await publisher.do("publish", *arguments, **options)
    return caught.value


def test_the_interface_is_that_of_the_publishers_for_redis() -> None:
    """Method by method, a program need change one line only."""
    for one, other in ((HttpPublisher, Publisher), (AsyncHttpPublisher, AsyncPublisher)):
        for name in ("publish", "publish_many", "close"):
            assert signature(getattr(one, name)) == signature(getattr(other, name))


@both
async def test_results_are_those_of_redis(redis_server: RedisServer, make: Callable[..., Any]) -> None:
    """The same items have the same results and errors, and polls get the same data."""
    outcomes, answers = [], []
    for http in (True, False):
        realm = uuid4().hex
        async with running(broker=redis_server.url, realm=realm) as server, connected(server) as client:
            if http:
                async with either(make, f"http://{server.address}") as publisher:
                    results = await publisher.do("publish_many", ITEMS)
            else:
                async with AsyncPublisher(redis_server.url, realm=realm) as direct:
                    results = await direct.publish_many(ITEMS)
            reply = await client.get("/poll?channel=a&timeout=0")
            answers.append([(message["channels"], message["data"]) for message in reply.json["messages"]])
        outcomes.append(
            [
                result.duplicate if isinstance(result, Receipt) else (type(result), result.detail, result.members)
                for result in results
            ]
        )

    assert outcomes[0] == outcomes[1]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4


@both
async def test_one(make: Callable[..., Any]) -> None:
    """Its id; a key stores once, and is told apart from another publication with it."""
    async with running() as server, either(make, f"http://{server.address}") as publisher, connected(server) as client:
        one = await publisher.do("publish", "a", 1, key="k")
        two = await publisher.do("publish", ["a", "b"], 2)
        again = await publisher.do("publish", "a", 1, key="k")
        errors = [
            await refusal(publisher, "a", 3, key="k"),
            await refusal(publisher, "a", "x" * 70_000),
            await refusal(publisher, [], 1),
        ]
        messages = (await client.get("/poll?channel=a&timeout=0")).json["messages"]

    assert one == again < two
    assert [message["id"] for message in messages] == [one, two]
    assert [type(error) for error in errors] == [KeyReused, TooLarge, InvalidParameter]


@both
async def test_many_are_split(make: Callable[..., Any]) -> None:
    """By count and by size, so that each request is one that a node takes; in order."""
    async with running(channel_max_messages=5000) as server, either(make, f"http://{server.address}") as publisher:
        small = await publisher.do("publish_many", ({"channels": ["a"], "data": n} for n in range(2001)))
        large = await publisher.do("publish_many", [{"channels": ["a"], "data": "x" * 60_000}] * 100)
        metrics = server.metrics
        requests = metrics.requests_lane + metrics.requests_web
        nothing = await publisher.do("publish_many", [])

        results = small + large
        assert all(isinstance(result, Receipt) for result in results)
        ids = [result.id for result in results]
        assert ids == sorted(set(ids))
        assert requests == metrics.requests_lane + metrics.requests_web == 3 + 6
        assert nothing == []


@both
async def test_who_may(tmp_path: Path, make: Callable[..., Any]) -> None:
    """A key, for its channels; an array has a result for each all the same."""
    file = tmp_path / "access.toml"
    file.write_text(
        f'[realms.default]\nsubscribe = "open"\n[[realms.default.keys]]\nname = "all"\nhash = "{hash_key(KEY)}"\n'
        'actions = ["publish"]\nchannels = ["a"]\n'
    )
    items = [{"channels": ["a"], "data": 1}, {"channels": ["b"], "data": 2}]
    async with running(access=file) as server:
        url = f"http://{server.address}"
        async with either(make, url, KEY) as publisher, either(make, url, "wrong") as stranger:
            assert await publisher.do("publish", "a", 1) > 0
            assert isinstance(await refusal(publisher, "b", 1), Forbidden)
            assert isinstance(await refusal(stranger, "a", 1), Unauthorized)
            mixed = await publisher.do("publish_many", items)
            refused = await stranger.do("publish_many", items)

    assert [type(result) for result in mixed] == [Receipt, Forbidden]
    assert [type(result) for result in refused] == [Unauthorized, Unauthorized]


CREATED = answer({"id": 7}, "201 Created")
CUT = Answer(b"", cut=True)
DOUBTS = {
    "nothing": CUT,
    "half an answer": Answer(b"HTTP/1.1 201 Created\r\nContent-Length: 9\r\n\r\n{", cut=True),
    "no answer": answer(b"<html>", "201 Created"),
    "a bad gateway": answer(b"<html>", "502 Bad Gateway", "text/html"),
    "a gateway's time-out": answer(b"<html>", "504 Gateway Timeout", "text/html"),
    "no server": answer(b"<html>", "503 Service Unavailable", "text/html"),
    "unavailable": problem(503, "unavailable", retry_after=0),
}


@both
@pytest.mark.parametrize("doubt", DOUBTS)
async def test_in_doubt_without_a_key(make: Callable[..., Any], doubt: str) -> None:
    """Whoever publishes is told that it may have been done; it is sent once."""
    async with stub(DOUBTS[doubt], CREATED) as server, either(make, server.url) as publisher:
        error = await refusal(publisher, "a", 1)
    assert type(error) is Unavailable
    assert error.detail.endswith(UNKNOWN)
    assert len(server.asked) == 1
    assert publisher.slept == []


@both
@pytest.mark.parametrize("retry", [False, True], ids=["key", "retry"])
@pytest.mark.parametrize("doubt", DOUBTS)
async def test_in_doubt_with_a_key(make: Callable[..., Any], doubt: str, retry: bool) -> None:
    """The same is sent again, with the same key: the caller's, or one that was made up for this call."""
    async with stub(DOUBTS[doubt], CREATED) as server, either(make, server.url, retry=retry) as publisher:
        assert await publisher.do("publish", "a", 1, key=None if retry else "k") == 7
    one, other = server.asked
    assert one.json == other.json
    assert one.json["key"] == "k" or (retry and len(one.json["key"]) == 32)


@both
async def test_no_key_is_made_up_unasked(make: Callable[..., Any]) -> None:
    """What is sent is what was said."""
    async with stub(CREATED) as server, either(make, server.url, KEY) as publisher:
        await publisher.do("publish", ["a", 17, "a"], {"x": None})
    (asked,) = server.asked
    assert (asked.method, asked.target) == ("POST", "/publish")
    assert asked.json == {"channels": ["a", 17], "data": {"x": None}}
    assert (asked.headers["authorization"], asked.headers["content-type"]) == (f"Bearer {KEY}", "application/json")


@both
@pytest.mark.parametrize("refused", [problem(429, "too_many_publications", retry_after=2), problem(408, "t")])
async def test_what_was_certainly_not_done(make: Callable[..., Any], refused: Answer) -> None:
    """Is done again, without a key as well, after the time that the server asks for."""
    async with stub(refused, CREATED) as server, either(make, server.url) as publisher:
        assert await publisher.do("publish", "a", 1) == 7
        assert publisher.slept == [2.025 if b"too_many" in refused.data else 0.025]


@both
async def test_a_rate_that_asks_for_more_time_than_there_is(make: Callable[..., Any]) -> None:
    """Is the caller's to wait for: the error says how long."""
    refused = problem(429, "too_many_publications", retry_after=9)
    async with stub(refused) as server, either(make, server.url, timeout=5) as publisher:
        error = await refusal(publisher, "a", 1)
    assert isinstance(error, TooManyPublications)
    assert error.members["retry_after"] == 9
    assert publisher.slept == []


@both
async def test_a_full_realm(make: Callable[..., Any]) -> None:
    """Is an answer, and not asked again."""
    async with stub(problem(503, "realm_full", retry_after=1)) as server, either(make, server.url) as publisher:
        assert isinstance(await refusal(publisher, "a", 1, key="k"), RealmFull)
    assert len(server.asked) == 1


@both
async def test_of_many_only_what_may_be_repeated_is(make: Callable[..., Any]) -> None:
    """Those with keys; of the others it is said that they may have been done."""
    items = [{"channels": ["a"], "data": n, **({"key": f"k{n}"} if n % 2 else {})} for n in range(4)]
    results = answer([{"id": 5}, {"error": {"code": "unavailable", "detail": "no", "retry_after": 0}}])
    again = answer([{"id": 6, "duplicate": True}])
    async with stub(CUT, results, again) as server, either(make, server.url) as publisher:
        got = await publisher.do("publish_many", items)

    assert [asked.json for asked in server.asked] == [items, [items[1], items[3]], [items[3]]]
    assert [got[1], got[3]] == [Receipt(5), Receipt(6, duplicate=True)]
    assert all(type(error) is Unavailable and error.detail.endswith(UNKNOWN) for error in (got[0], got[2]))


@both
@pytest.mark.parametrize("results", [[], [{"id": 1}], [{"id": 1}] * 3, [{"id": 1}, {}], [{"id": 1}, 2], {"id": 1}])
async def test_results_that_do_not_fit(make: Callable[..., Any], results: Any) -> None:
    """Too few, too many or none at all: nothing is known of any publication."""
    async with stub(answer(results)) as server, either(make, server.url) as publisher:
        got = await publisher.do("publish_many", [{"channels": ["a"], "data": n} for n in range(2)])
    assert [type(result) for result in got] == [Unavailable] * 2


@both
async def test_no_server_at_all(make: Callable[..., Any]) -> None:
    """It is tried until the time is up."""
    async with stub() as gone:
        url = gone.url
    now = iter(range(1000))
    async with either(make, url, timeout=20, clock=lambda: float(next(now))) as publisher:
        error = await refusal(publisher, "a", 1)
    assert type(error) is Unavailable
    assert error.detail.startswith(f"cannot reach {url}: ")
    assert len(publisher.slept) > 3


@both
async def test_a_server_that_says_nothing(make: Callable[..., Any]) -> None:
    """Within the time of the call."""
    async with stub() as server, either(make, server.url, timeout=0.2) as publisher:
        error = await refusal(publisher, "a", 1)
    assert error.detail.endswith(UNKNOWN)


# The blocking publisher alone


async def test_from_several_threads() -> None:
    """Each thread has a connection while it publishes; all are one service's."""
    async with running() as server, connected(server) as client:
        with HttpPublisher(f"http://{server.address}") as publisher, ThreadPoolExecutor(8) as threads:
            ids = await asyncio.gather(
                *(
                    asyncio.get_running_loop().run_in_executor(threads, publisher.publish, "a", number)
                    for number in range(100)
                )
            )
        messages = (await client.get("/poll?channel=a&timeout=0")).json["messages"]
        assert sorted(ids) == [message["id"] for message in messages]
        assert server.metrics.connections_opened <= 1 + 8
        await eventually(
            lambda: server.metrics.connections_opened - server.metrics.connections_closed == 1, "all were closed"
        )


FORK = """
import os, sys
from pushup import HttpPublisher
publisher = HttpPublisher(sys.argv[1])
publisher.publish("a", "parent")
child = os.fork()
for number in range(50):
    publisher.publish("a", [child == 0, number])
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
publisher.publish("a", "end")
publisher.close()
"""


async def test_after_a_fork() -> None:
    """Parent and child do not share a connection: both get their own answers."""
    async with running() as server, connected(server) as client:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", FORK, f"http://{server.address}", stderr=subprocess.PIPE
        )
        async with asyncio.timeout(PATIENCE_S):
            _, said = await process.communicate()
        assert (process.returncode, said) == (0, b"")
        messages = (await client.get("/poll?channel=a&timeout=0")).json["messages"]
        assert server.metrics.connections_opened == 3

    data = [message["data"] for message in messages]
    assert [one for one in data if isinstance(one, str)] == ["parent", "end"]
    for child in (False, True):
        assert [one[1] for one in data if one[0] is child] == list(range(50))


async def test_a_later_publication_opens_another_connection() -> None:
    """After close, as with the publisher for Redis."""
    async with running() as server:
        publisher = HttpPublisher(f"http://{server.address}")
        for _ in range(2):
            await asyncio.to_thread(publisher.publish, "a", 1)
            publisher.close()
        assert server.metrics.connections_opened == 2


def certify(certificate: Path, key: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", str(key), "-out", str(certificate), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)


@both
async def test_over_tls(tmp_path: Path, make: Callable[..., Any]) -> None:
    """With a certificate of one's own in an SSLContext; one that is not trusted ends it before anything is sent."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    await asyncio.to_thread(certify, certificate, key)
    async with running(tls_certificate=certificate, tls_key=key) as server:
        url = f"https://{server.address}"
        trusting = ssl.create_default_context(cafile=os.fspath(certificate))
        async with either(make, url, ssl_context=trusting) as publisher, either(make, url, timeout=1) as wary:
            for number in range(3):
                assert await publisher.do("publish", "a", number) > 0
            assert server.metrics.connections_opened == 1
            error = await refusal(wary, "a", 1)
    assert error.detail.startswith(f"cannot reach {url}: ")
    assert "CERTIFICATE_VERIFY_FAILED" in error.detail
