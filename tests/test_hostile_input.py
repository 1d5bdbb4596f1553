"""Hostile input through a whole server: always a clear refusal, never a fault, and nobody else is any the worse."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import pytest

from pushup.messages import MAX_ID
from pushup.server import Server
from tests.support import Client, Reply, connected, parked, running

DEEP: Final = 100_000
MANY: Final = 10_000
LONG: Final = 5_000


class Case(NamedTuple):
    """A request, and what is said of it. `parameter` is None where it is the whole that is wrong."""

    method: str
    target: str
    body: bytes | None
    parameter: str | None
    status: int = 400


def poll(query: str, parameter: str | None) -> Case:
    return Case("GET", f"/poll?{query}", None, parameter)


def body(target: str, text: bytes | str, parameter: str | None, status: int = 400) -> Case:
    return Case("POST", target, text.encode() if isinstance(text, str) else text, parameter, status)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


NUMBERS: Final[Mapping[str, str]] = {
    "negative": "-1",
    "2**53": str(2**53),
    "2**53 + 1": str(2**53 + 1),
    "2**63": str(2**63),
    "2**64": str(2**64),
    "minus 2**63": str(-(2**63)),
    "a long one": "9" * LONG,
    "a fraction": "1.5",
    "true": "true",
    "null": "null",
    "a text": '"5"',
    "an array": "[1]",
    "an object": "{}",
}
"""What is no id."""

SECONDS: Final[Mapping[str, str]] = {
    "negative": "-1",
    "nearly nothing below zero": "-1e-300",
    "too long": "1e10",
    "true": "true",
    "null": "null",
    "a text": '"5"',
    "an array": "[1]",
}
"""What is no time."""

NO_JSON: Final[Mapping[str, bytes]] = {
    "white space": b" \r\n\t",
    "NUL": b"\x00",
    "single quotes": b"{'a':1}",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "UTF-32": "{}".encode("utf-32-le"),
    "half": b"{",
    "more than one": b"1 1",
    "a comma": b"{,}",
    "a comment": b"{/**/}",
}
"""What is no JSON, whoever reads it."""

NO_VALUES: Final[Mapping[str, bytes]] = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "a plus": b"+1",
    "hexadecimal": b"0x1",
    "a leading zero": b"01",
    "a capital": b"True",
    "Latin-1": b'"\xe4"',
    "overlong UTF-8": b'"\xc0\xaf"',
    "an encoded surrogate": b'"\xed\xa0\x80"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "half a surrogate pair": b'"\\ud800"',
    "the other half": b'"\\udc00x"',
    "a pair the wrong way round": b'"\\udc00\\ud800"',
    "a control character": b'"a\x01"',
    "a comma too many": b'"a",',
}
"""What is no JSON value, in the place of one."""

PLACES: Final[Mapping[str, tuple[str, bytes]]] = {
    "data": ("/publish", b'{"channels":["a"],"data":%b}'),
    "channels": ("/publish", b'{"data":1,"channels":[%b]}'),
    "key": ("/publish", b'{"channels":["a"],"data":1,"key":%b}'),
    "channels of a poll": ("/poll", b'{"channels":[%b]}'),
    "start": ("/poll", b'{"channels":["a"],"start":%b}'),
    "name": ("/channels", b'{"name":%b}'),
}

CASES: Final[Mapping[str, Case]] = {
    **{
        f"poll, {field}, {name}": body("/poll", f'{{"channels":["a"],"{field}":{text}}}', field)
        for field, values in (("start", NUMBERS), ("end", NUMBERS), ("timeout", SECONDS))
        for name, text in values.items()
    },
    **{
        f"query, {field}, {name}": poll(f"channel=a&{field}={quote(text)}", field)
        for field, values in (("start", NUMBERS), ("end", NUMBERS), ("timeout", SECONDS))
        for name, text in values.items()
    },
    **{
        f"create, {field}, {name}": body("/channels", f'{{"{field}":{text}}}', field)
        for field, values in (("ttl", SECONDS), ("window", SECONDS), ("max_messages", NUMBERS))
        for name, text in values.items()
    },
    **{f"renew, {name}": body("/channels/a/renew", f'{{"ttl":{text}}}', "ttl") for name, text in SECONDS.items()},
    **{
        f"{target}, {name}": body(target, text, None)
        for target in ("/publish", "/poll", "/channels", "/channels/a/renew")
        for name, text in NO_JSON.items()
    },
    "publish, empty": body("/publish", "", None),
    "poll, empty": body("/poll", "", None),
    # Bombs.
    "deep data": body("/publish", f'{{"channels":["a"],"data":{nested(DEEP)}}}', None),
    "data that is just too deep": body("/publish", f'{{"channels":["a"],"data":{nested(200)}}}', "data"),
    "deep objects as data": body("/publish", '{"channels":["a"],"data":' + '{"a":' * 9000 + "1" + "}" * 9001, None),
    "deep channels": body("/publish", f'{{"channels":{nested(DEEP)},"data":1}}', "channels"),
    "deep channels of a poll": body("/poll", f'{{"channels":{nested(DEEP)}}}', "channels"),
    "a deep start": body("/poll", f'{{"channels":["a"],"start":{nested(DEEP)}}}', "start"),
    "a deep name": body("/channels", f'{{"name":{nested(DEEP)}}}', "name"),
    "a deep ttl": body("/channels/a/renew", f'{{"ttl":{nested(DEEP)}}}', "ttl"),
    "a deep unknown field": body("/poll", f'{{"channels":["a"],"x":{nested(DEEP)}}}', "x"),
    "a deep body": body("/poll", nested(DEEP), None),
    "an open body": body("/poll", "[" * DEEP, None),
    "open objects": body("/channels", '{"a":' * DEEP, "a"),
    "many keys": body("/poll", json.dumps({f"k{n}": n for n in range(MANY)}), "k0"),
    "many channels": body("/poll", json.dumps({"channels": [f"c{n}" for n in range(MANY)]}), None, 413),
    "many channels to publish to": body("/publish", json.dumps({"channels": ["a"] * MANY, "data": 1}), None, 413),
    "many publications": body("/publish", json.dumps([{"channels": ["a"], "data": 1}] * MANY), None, 413),
    "large data": body("/publish", json.dumps({"channels": ["a"], "data": "x" * 70_000}), None, 413),
    "a large body": body("/publish", json.dumps({"channels": ["a"], "data": "x" * 5_000_000}), None, 413),
    "a number as data that is too large": body("/publish", '{"channels":["a"],"data":1e400}', "data"),
    # Names and types.
    "a channel that is true": body("/poll", '{"channels":[true]}', "channels"),
    "a channel that is null": body("/publish", '{"channels":[null],"data":1}', "channels"),
    "a channel that is a fraction": body("/publish", '{"channels":[1.5],"data":1}', "channels"),
    "a channel that is zero": body("/publish", '{"channels":[0],"data":1}', "channels"),
    "a channel above 2**53": body("/publish", f'{{"channels":[{MAX_ID + 1}],"data":1}}', "channels"),
    "a channel of 2**64": body("/publish", f'{{"channels":[{2**64}],"data":1}}', "channels"),
    "a channel of many digits": body("/publish", f'{{"channels":[{"9" * LONG}],"data":1}}', "channels"),
    "a channel of many bytes": body("/poll", json.dumps({"channels": ["x" * 256]}), "channels"),
    "a channel with NUL": body("/poll", r'{"channels":["a\u0000"]}', "channels"),
    "channels that are a text": body("/poll", '{"channels":"a"}', "channels"),
    "channels that are null": body("/publish", '{"channels":null,"data":1}', "channels"),
    "channels in channels": body("/publish", '{"channels":[["a"]],"data":1}', "channels"),
    "no channels": body("/publish", '{"channels":[],"data":1}', "channels"),
    "no data": body("/publish", '{"channels":["a"]}', "data"),
    "a key that is a number": body("/publish", '{"channels":["a"],"data":1,"key":5}', "key"),
    "a key that is null": body("/publish", '{"channels":["a"],"data":1,"key":null}', "key"),
    "a key that is empty": body("/publish", '{"channels":["a"],"data":1,"key":""}', "key"),
    "a key of many characters": body("/publish", json.dumps({"channels": ["a"], "data": 1, "key": "k" * 256}), "key"),
    "a name that is null": body("/channels", '{"name":null}', "name"),
    "a name that is a number": body("/channels", '{"name":17}', "name"),
    "an unknown field": body("/publish", '{"channels":["a"],"data":1,"cahnnels":["b"]}', "cahnnels"),
    "an unknown field of a poll": body("/poll", '{"channels":["a"],"since":1}', "since"),
    "an unknown field of a channel": body("/channels", '{"name":"a","tll":1}', "tll"),
    "an unknown field of a renewal": body("/channels/a/renew", '{"max_messages":1}', "max_messages"),
    "an unknown parameter": poll("chanel=a", "chanel"),
    "an unknown parameter of many characters": poll("channel=a&" + "x" * LONG, "x" * 100),
    "an unknown parameter of a listing": Case("GET", "/channels?x=1", None, "x"),
    "a limit of 2**64": Case("GET", f"/channels?limit={2**64}", None, "limit"),
    "a start that is given twice": poll("channel=a&start=1&start=1", "start"),
    "a query that is not UTF-8": poll("channel=%ff", None),
    "a query that is overlong": poll("channel=%c0%af", None),
    "a query with a surrogate": poll("channel=%ed%a0%80", None),
    "a query that is no encoding": poll("channel=%u0041", None),
    "a path that is not UTF-8": Case("GET", "/channels/%ff", None, None),
    "an array": body("/poll", "[]", None),
    "an array of arrays": body("/channels", "[[[]]]", None),
    "a text": body("/publish", '"a"', None),
    "null": body("/poll", "null", None),
    "a number": body("/channels", "1e400", None),
}

ITEMS: Final[Mapping[str, tuple[str, str | None]]] = {
    "1e400": ('{"channels":["a"],"data":1e400}', "data"),
    "an array": ("[[[]]]", None),
    "null": ("null", None),
    "an unknown field": ('{"channels":["a"],"data":1,"x":1}', "x"),
    "deep": (f'{{"channels":["a"],"data":{nested(200)}}}', "data"),
}


ACCEPTED: Final[Mapping[str, tuple[str, str, str]]] = {
    # What is sent, and what a poll is told, byte for byte.
    "2**53 + 1": ("9007199254740993", "9007199254740993", "a"),
    "2**64": ("18446744073709551616", "18446744073709551616", "a"),
    "many digits": ("1" * 300, "1" * 300, "a"),
    "nearly nothing": ("1e-400", "1e-400", "a"),
    "minus zero": ("-0.0", "-0.0", "a"),
    "a pair": (r'"\ud83d\ude00"', r'"\ud83d\ude00"', "a"),
    "NUL": (r'"\u0000"', r'"\u0000"', "a"),
    "deep": (nested(99), nested(99), "a"),
    "the same key twice": ('{"a":1,"a":2}', '{"a":1,"a":2}', "a"),
    "an end of a script": ('"</script>"', '"</script>"', "a"),
}
"""What is odd, and allowed."""

SIDES: Final = {"lane": "", "web": "Content-Encoding: identity\r\n"}
"""A header field sends polls to the web side."""


class Users:
    """A client that asks, on one connection after the other, and one whose poll waits meanwhile."""

    def __init__(self, server: Server, waiting: Client, headers: str) -> None:
        self.server = server
        self._waiting = waiting
        self._headers = headers
        self.closed = 0
        """How often the server closed the connection after an answer."""
        self._client: Client | None = None

    async def ask(self, case: Case) -> Reply:
        if self._client is None:
            host, _, port = self.server.address.rpartition(":")
            self._client = Client(*await asyncio.open_connection(host, int(port)))
        reply = await self._client.request(case.method, case.target, case.body, self._headers)
        if reply.headers.get("connection") == "close":
            self.closed += 1
            await self.leave()
        return reply

    async def leave(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def expect_unharmed(self) -> None:
        """Who waited all the time is told at last."""
        assert self.server.node.parked == 1
        reply = await self.ask(body("/publish", '{"channels":["bystander"],"data":"at last"}', None))
        assert reply.status == 201
        (message,) = (await self._waiting.reply()).json["messages"]
        assert message["data"] == "at last"


@asynccontextmanager
async def users(side: str) -> AsyncIterator[Users]:
    async with running() as server, connected(server) as waiting:
        waiting.send("GET /poll?channel=bystander&start=latest HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        made = Users(server, waiting, SIDES[side])
        try:
            yield made
            await made.expect_unharmed()
        finally:
            await made.leave()


def faults(reply: Reply, status: int, parameters: set[str | None]) -> list[Any]:
    """What is wrong with a refusal; nothing if it is one as it should be."""
    problem = reply.json
    seen = (reply.status, problem.get("status"), reply.headers.get("content-type"))
    good = seen == (status, status, "application/problem+json") and problem.get("parameter") in parameters
    return [] if good and problem["detail"] and problem["code"] else [reply]


@pytest.mark.parametrize("side", SIDES)
async def test_every_case_is_refused_clearly(side: str) -> None:
    """With its status and the name of what is wrong; the connection goes on, and a parked poll is not disturbed."""
    async with users(side) as it:
        wrong = {name: faults(await it.ask(case), case.status, {case.parameter}) for name, case in CASES.items()}

        assert {name: found for name, found in wrong.items() if found} == {}
        assert it.closed <= 1  # A body that is too large need not be read to its end.


@pytest.mark.parametrize("side", SIDES)
async def test_what_is_no_value_is_refused_in_every_place(side: str) -> None:
    """The field is named, or the JSON as such is said to be wrong."""
    async with users(side) as it:
        wrong = {}
        for place, (target, template) in PLACES.items():
            for name, value in NO_VALUES.items():
                reply = await it.ask(body(target, template % value, None))
                wrong[place, name] = faults(reply, 400, {None, place.partition(" ")[0]})

        assert {name: found for name, found in wrong.items() if found} == {}
        assert it.closed == 0


async def test_a_wrong_item_of_an_array_spoils_no_other() -> None:
    """It is refused in its place, with the name of what is wrong."""
    async with users("web") as it:
        good = '{"channels":["a"],"data":1}'
        text = ",".join([good, *[item for item, _ in ITEMS.values()], good])

        reply = await it.ask(body("/publish", f"[{text}]", None))

        first, *refused, last = reply.json
        assert "id" in first
        assert "id" in last
        assert [(item["error"]["status"], item["error"].get("parameter")) for item in refused] == [
            (400, parameter) for _, parameter in ITEMS.values()
        ]


@pytest.mark.parametrize("name", ACCEPTED)
async def test_what_is_odd_and_allowed_goes_through_as_it_came(name: str) -> None:
    """Byte for byte, to a poll over the lane."""
    data, told, channel = ACCEPTED[name]
    async with running() as server, connected(server) as client:
        published = await client.request("POST", "/publish", f'{{"channels":["{channel}"],"data":{data}}}'.encode())
        reply = await client.get(f"/poll?channel={channel}&timeout=1e-400")

        assert published.status == 201
        assert f'"data":{told}}}'.encode() in reply.body
