"""Publications over HTTP: to whoever may publish, and whoever may not, the lane says what the web side says."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import jwt
import pytest

from pushup.access import hash_key
from pushup.server import Server
from tests import pipes
from tests.support import running
from tests.test_lane_differential import normalise, post

SECRET = "s" * 32
ACCESS = f"""
[realms.default]
subscribe = "open"
[[realms.default.keys]]
name = "backend"
hash = "{hash_key("good")}"
channels = ["a", "b*"]
[[realms.default.keys]]
name = "reader"
hash = "{hash_key("reader")}"
actions = ["subscribe"]
[realms.default.tokens]
secret_file = "SECRET_FILE"
publish = true
[realms.slow]
subscribe = "open"
settings = {{ publish_rate_max = 1, publish_batch_max = 3 }}
[[realms.slow.keys]]
name = "backend"
hash = "{hash_key("slow")}"
[realms.full]
subscribe = "open"
settings = {{ realm_bytes_max = 10 }}
[[realms.full.keys]]
name = "backend"
hash = "{hash_key("full")}"
"""
SETTINGS = {
    "cors_origins": "http://page",
    "message_bytes_max": 300,
    "publish_channels_max": 3,
    "publish_batch_max": 5,
    "body_bytes_max": 4096,
}


def publish(body: bytes, *headers: bytes, key: bytes = b"good", realm: bytes = b"", version: bytes = b"1.1") -> bytes:
    path = b"/realms/%b/publish" % realm if realm else b"/publish"
    authorization = (b"Authorization: Bearer " + key,) if key else ()
    return post(path, body, *authorization, *headers, version=version)


def token(**claims: object) -> bytes:
    return jwt.encode({"sub": "u", "exp": 4102444800, "pushup": {"publish": ["a"]}} | claims, SECRET).encode()


ONE = b'{"channels":["a"],"data":1}'

CASES = {
    "one": publish(ONE),
    "several, one after the other": publish(ONE) * 3,
    "white space around": publish(b"\r\n " + ONE + b"\t"),
    "several channels": publish(b'{"channels":["a","b1","a"],"data":{"x":[1,null]}}'),
    "line breaks between": publish(b'{"channels":["a"],\r\n"data":[1,\n2]}'),
    "an array": publish(b"[" + ONE + b"," + ONE + b"]"),
    "an empty array": publish(b"[]"),
    "an array with all that can be wrong": publish(
        b"[" + ONE + b',{},{"channels":["c"],"data":1},{"channels":["a"],"data":"\xff"},7]'
    ),
    "an array that is too long": publish(b"[" + b",".join([ONE] * 6) + b"]"),
    "an array that ends too soon": publish(b"[" + ONE),
    "nothing": publish(b""),
    "no length": publish(b"").replace(b"Content-Length: 0\r\n", b""),
    "blanks": publish(b"  "),
    "no JSON": publish(b"channels=a"),
    "something behind it": publish(ONE + b"x"),
    "not UTF-8": publish(b'{"channels":["a"],"data":"\xff"}'),
    "no object": publish(b"1"),
    "no channels": publish(b'{"data":1}'),
    "an empty list of channels": publish(b'{"channels":[],"data":1}'),
    "channels that are no list": publish(b'{"channels":"a","data":1}'),
    "a channel that cannot be": publish(b'{"channels":["a\\u0000"],"data":1}'),
    "an integer channel": publish(b'{"channels":[12],"data":1}', key=b"full", realm=b"full"),
    "too many channels": publish(b'{"channels":["a","b","b1","b2"],"data":1}'),
    "an unknown field": publish(b'{"channels":["a"],"data":1,"dada":2}'),
    "no data": publish(b'{"channels":["a"]}'),
    "data that is null": publish(b'{"channels":["a"],"data":null}'),
    "data that is too long": publish(b'{"channels":["a"],"data":"' + b"x" * 300 + b'"}'),
    "data that nests too deep": publish(b'{"channels":["a"],"data":' + b"[" * 101 + b"]" * 101 + b"}"),
    "a surrogate": publish(b'{"channels":["a"],"data":"\\ud800"}'),
    "a key": publish(b'{"channels":["a"],"data":1,"key":"k"}') * 2,
    "a key in the header": publish(ONE, b"Idempotency-Key: k") * 2,
    "a key in both": publish(b'{"channels":["a"],"data":1,"key":"k"}', b"Idempotency-Key: k"),
    "keys that differ": publish(b'{"channels":["a"],"data":1,"key":"k"}', b"Idempotency-Key: l"),
    "a key used again": publish(ONE, b"Idempotency-Key: k")
    + publish(b'{"channels":["a"],"data":2}', b"Idempotency-Key: k"),
    "two keys": publish(ONE, b"Idempotency-Key: k", b"Idempotency-Key: k"),
    "an empty key": publish(ONE, b"Idempotency-Key:"),
    "a key of blanks": publish(ONE, b"Idempotency-Key:   "),
    "a key that is too long": publish(ONE, b"Idempotency-Key: " + b"k" * 256),
    "a key of other bytes": publish(ONE, b"Idempotency-Key: \xc3\xa4\xff"),
    "a key of an array": publish(b"[" + ONE + b"]", b"Idempotency-Key: k"),
    "a key that is empty in the body": publish(b'{"channels":["a"],"data":1,"key":""}'),
    "no credentials": publish(ONE, key=b""),
    "no credentials, no JSON": publish(b"x", key=b""),
    "wrong credentials": publish(ONE, key=b"bad"),
    "credentials twice": publish(ONE, b"Authorization: Bearer good"),
    "credentials of another kind": publish(ONE, b"Authorization: Basic Zm9v", key=b""),
    "a key that may not publish": publish(ONE, key=b"reader"),
    "a channel that is not the key's": publish(b'{"channels":["a","c"],"data":1}'),
    "a key of another realm": publish(ONE, key=b"slow"),
    "a realm": publish(ONE, key=b"slow", realm=b"slow"),
    "the root realm by name": publish(ONE, realm=b"default"),
    "a realm that is not there": publish(ONE, realm=b"nothing"),
    "a realm that cannot be": publish(ONE, realm=b".x"),
    "a realm in percent": publish(ONE, key=b"slow", realm=b"%73low"),
    "faster than the rate": publish(ONE, key=b"slow", realm=b"slow") * 3,
    "faster than the rate, and wrong": publish(b"x", key=b"slow", realm=b"slow") * 3,
    "an array and then faster than the rate": publish(b"[" + ONE + b"," + ONE + b"]", key=b"slow", realm=b"slow")
    + publish(b"[" + ONE + b"]", key=b"slow", realm=b"slow"),
    "a realm that is full": publish(b'{"channels":["a"],"data":"xxxxxxxxxxx"}', key=b"full", realm=b"full"),
    "a token": publish(ONE, key=token()),
    "a token with an idempotency key": publish(ONE, b"Idempotency-Key: k", key=token()) * 2,
    "a token of another channel": publish(b'{"channels":["b"],"data":1}', key=token()),
    "a token that has expired": publish(ONE, key=token(exp=1)),
    "a token in a cookie": publish(ONE, b"Cookie: pushup_token=" + token(), key=b""),
    "a cookie from a page": publish(ONE, b"Origin: http://page", b"Cookie: pushup_token=" + token(), key=b""),
    "a cookie from another page": publish(ONE, b"Origin: http://evil", b"Cookie: pushup_token=" + token(), key=b""),
    "a token in the query": post(b"/publish?token=" + token(), ONE),
    "a key in a cookie": publish(ONE, b"Cookie: pushup_token=good", key=b""),
    "from a page": publish(ONE, b"Origin: http://page"),
    "from a page, wrong": publish(b"x", b"Origin: http://page"),
    "from another page": publish(ONE, b"Origin: http://evil"),
    "from another page, without credentials": publish(ONE, b"Origin: http://evil", key=b""),
    "from two pages": publish(ONE, b"Origin: http://page", b"Origin: http://page"),
    "from the same origin": publish(ONE, b"Origin: http://test"),
    "forwarded": publish(ONE, b"X-Forwarded-For: 192.0.2.1"),
    "a query": publish(ONE).replace(b"/publish ", b"/publish?x=y "),
    "a body that is too large": publish(ONE.ljust(5000)),
    "a body as large as may be": publish(ONE.ljust(4096)),
    "identity": publish(ONE, b"Content-Encoding: identity"),
    "gzip": publish(ONE, b"Content-Encoding: gzip"),
    "any content type": publish(ONE, b"Content-Type: text/plain; charset=latin-1", b"Accept: text/html"),
    "HTTP/1.0": publish(ONE, version=b"1.0"),
    "HTTP/1.0, wrong": publish(b"x", version=b"1.0"),
    "HTTP/1.0, kept alive": publish(ONE, b"Connection: keep-alive", version=b"1.0") * 2,
    "the last": publish(ONE, b"Connection: close"),
    "the last, and wrong": publish(b"x", b"Connection: close"),
}


@asynccontextmanager
async def twins(directory: Path) -> AsyncIterator[tuple[Server, Server]]:
    """Two servers with the same rules, that know nothing of each other."""
    secret, access = directory / "secret", directory / "access.toml"
    secret.write_text(SECRET)
    access.write_text(ACCESS.replace("SECRET_FILE", str(secret)))
    async with running(access=access, **SETTINGS) as one, running(access=access, **SETTINGS) as other:
        yield one, other


async def exchange(connection: pipes.Pipe, segments: Sequence[bytes]) -> tuple[list[pipes.Response], bool]:
    """What was answered without what differs from moment to moment, and whether that was the end."""
    answers = [normalise(answer) for answer in await connection.receive(*segments)]
    closing = connection.closing
    connection.hang_up()
    await connection.settle()
    return answers, closing


@pytest.mark.parametrize("closing", [False, True], ids=["serving", "draining"])
@pytest.mark.parametrize("name", CASES)
async def test_the_lane_says_what_the_web_side_says(
    name: str, closing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and cut in the head, before the body, and in the body; and the counters agree."""
    monkeypatch.setattr("pushup.realm.monotonic", lambda: 0.0)
    data = CASES[name]
    body = data.index(b"\r\n\r\n") + 4
    async with twins(tmp_path) as (server, reference):
        for one in (server, reference):
            one.service.closing = one.node.draining = closing
        for cut in (0, 20, body, min(body + 3, len(data))):
            segments = [part for part in (data[:cut], data[cut:]) if part]

            seen = await exchange(pipes.lane(server), segments)
            expected = await exchange(pipes.aiohttp(reference), segments)

            assert seen == expected
        assert server.metrics.refused == reference.metrics.refused
        for realm, metrics in server.metrics.realms.items():
            other = reference.metrics.realms[realm]
            assert (metrics.publications, metrics.publications_duplicate, metrics.publications_refused) == (
                other.publications,
                other.publications_duplicate,
                other.publications_refused,
            )


async def test_the_cases_take_the_lane(tmp_path: Path) -> None:
    """All but the few that need aiohttp, or this compares aiohttp with itself."""
    async with twins(tmp_path) as (server, _):
        for data in CASES.values():
            await exchange(pipes.lane(server), [data])

        assert server.metrics.requests_web == len(
            ["a query", "a token in the query", "too large", "identity", "gzip", "percent", "cannot be"]
        )
