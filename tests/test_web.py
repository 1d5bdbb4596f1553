"""The web side: every route as a user of HTTP sees it."""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import pytest

from pushup.errors import PushUpError
from pushup.messages import MAX_ID, ChannelInfo
from pushup.server import Server
from tests import pipes
from tests.support import Client, Reply, connected, parked, running

SECOND = 1_000_000


def problem(reply: Reply) -> tuple[int, str, str]:
    """Status, code and sentence of an error, whose form is checked."""
    document = reply.json
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    assert "server" not in reply.headers
    assert document["type"] == "about:blank"
    assert document["status"] == reply.status
    assert document["title"]
    return reply.status, document["code"], document["detail"]


def refusal(reply: Reply) -> tuple[int, str, str | None]:
    """Status, code and parameter of an error, whose form is checked."""
    status, code, _ = problem(reply)
    return status, code, reply.json.get("parameter")


def refused(server: Server) -> dict[str, int]:
    """The errors that were answered, by code."""
    return {code: count for code, count in server.metrics.refused.items() if count}


async def chunked(client: Client, method: str, target: str, body: bytes) -> None:
    """Send a request whose length is not told before."""
    client.send(f"{method} {target} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
    client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")


async def messages(client: Client, channel: str | int) -> list[dict[str, Any]]:
    """What is cached in a channel."""
    reply = await client.get(f"/poll?channel={channel}&timeout=0")
    assert reply.status == 200
    found: list[dict[str, Any]] = reply.json["messages"]
    return found


# Publishing


async def test_publish_answers_with_the_id() -> None:
    """A publication is 201, and its id is that of the message that polls get."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", "/publish", {"channels": ["a"], "data": {"x": [1]}})

        assert reply.status == 201
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["cache-control"] == "no-store"
        assert set(reply.json) == {"id"}
        assert await messages(client, "a") == [{"id": reply.json["id"], "channels": ["a"], "data": {"x": [1]}}]


async def test_one_message_goes_to_many_channels() -> None:
    """Published to several channels it is one message, shown with those that were polled."""
    async with running() as server, connected(server) as client:
        id = await client.publish("a", "b", "c", data=1)

        reply = await client.get("/poll?channel=a&channel=c&channel=d")

        assert reply.json["messages"] == [{"id": id, "channels": ["a", "c"], "data": 1}]
        assert await messages(client, "b") == [{"id": id, "channels": ["b"], "data": 1}]


async def test_a_channel_named_twice_gets_the_message_once() -> None:
    """Naming a channel twice in one publication changes nothing."""
    async with running() as server, connected(server) as client:
        await client.publish("a", "a", data=1)

        assert len(await messages(client, "a")) == 1


@pytest.mark.parametrize(
    "text",
    [
        *(
            "null",
            "true",
            "0",
            "-0",
            "1.0",
            "1e2",
            "12345678901234567890123",
            '""',
            '"é€😀"',
            '"\\u00e9\\ud83d\\ude00"',
        ),
        *("[]", "{}", '{"b":1,"a":{"c":[null,false]}}', '{"":{"":""}}', '"\\u0000\\n"', "[1, 2 , 3]", '{"a":1,"a":2}'),
    ],
)
async def test_data_is_any_json_and_stays_as_it_was_written(text: str) -> None:
    """A message's data comes back byte for byte."""
    async with running() as server, connected(server) as client:
        await client.request("POST", "/publish", b'{"channels":["a"],"data":%b}' % text.encode())

        reply = await client.get("/poll?channel=a")

        assert b'"data":%b}' % text.encode() in reply.body


async def test_data_is_kept_on_one_line() -> None:
    """Line breaks between the values of a message become spaces."""
    async with running() as server, connected(server) as client:
        await client.request("POST", "/publish", b'{"channels":["a"],"data":[1,\r\n 2]}')

        reply = await client.get("/poll?channel=a")

        assert b'"data":[1,   2]}' in reply.body


async def test_a_batch_has_a_result_for_each_item_in_order() -> None:
    """In an array a wrong item is its error, and the others are published."""
    async with running() as server, connected(server) as client:
        reply = await client.request(
            "POST",
            "/publish",
            [
                {"channels": ["a"], "data": 1},
                {"channels": [], "data": 2},
                {"channels": [77], "data": 3},
                "nonsense",
                {"channels": ["a", "b"], "data": 4},
            ],
        )

        assert reply.status == 200
        first, second, third, fourth, fifth = reply.json
        assert second["error"]["code"] == "invalid_parameter"
        assert third["error"] == {
            "type": "about:blank",
            "title": "Not Found",
            "status": 404,
            "code": "channel_not_found",
            "detail": "channel 77 does not exist",
            "channel": 77,
        }
        assert (fourth["error"]["status"], fourth["error"]["code"]) == (400, "invalid_request")
        assert first["id"] < fifth["id"]
        assert [(m["id"], m["data"]) for m in await messages(client, "a")] == [(first["id"], 1), (fifth["id"], 4)]


async def test_an_empty_batch_is_fine() -> None:
    """An array of nothing has no results."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", "/publish", [])

        assert (reply.status, reply.json) == (200, [])


async def test_a_batch_is_bounded() -> None:
    """More publications than publish_batch_max are refused, and none is published."""
    async with running(publish_batch_max=2) as server, connected(server) as client:
        item = {"channels": ["a"], "data": 1}

        assert (await client.request("POST", "/publish", [item] * 2)).status == 200
        assert problem(await client.request("POST", "/publish", [item] * 3)) == (
            413,
            "too_large",
            "the array has 3 publications; the limit is 2",
        )
        assert len(await messages(client, "a")) == 2


async def test_a_message_is_bounded() -> None:
    """Data over message_bytes_max is refused."""
    async with running(message_bytes_max=10) as server, connected(server) as client:
        assert (await client.request("POST", "/publish", {"channels": ["a"], "data": "x" * 8})).status == 201
        reply = await client.request("POST", "/publish", {"channels": ["a"], "data": "x" * 9})

        assert problem(reply) == (413, "too_large", "data is 11 bytes of JSON; the limit is 10")


async def test_the_channels_of_a_publication_are_bounded() -> None:
    """More channels than publish_channels_max are refused."""
    async with running(publish_channels_max=2) as server, connected(server) as client:
        reply = await client.request("POST", "/publish", {"channels": ["a", "b", "c"], "data": 1})

        assert problem(reply) == (413, "too_large", "a publication names at most 2 channels")


async def test_a_body_is_bounded() -> None:
    """A body over body_bytes_max is refused, and the connection goes on."""
    async with running(body_bytes_max=1000) as server, connected(server) as client:
        assert (await client.request("POST", "/publish", b'{"channels":["a"],"data":1}'.ljust(1000))).status == 201
        reply = await client.request("POST", "/publish", b'{"channels":["a"],"data":1}'.ljust(1001))

        assert problem(reply) == (413, "too_large", "the request's body is too large")
        assert await messages(client, "a") != []


async def test_a_chunked_body_is_bounded() -> None:
    """A body whose length is not told before is bounded as well."""
    async with running(body_bytes_max=1000) as server, connected(server) as client:
        await chunked(client, "POST", "/publish", b'{"channels":["a"],"data":1}'.ljust(1001))

        assert problem(await client.reply()) == (413, "too_large", "the request's body is too large")


async def test_publishing_to_a_missing_integer_channel_publishes_nothing() -> None:
    """If one of its channels does not exist, a publication reaches none."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", "/publish", {"channels": ["a", 5], "data": 1})

        assert problem(reply) == (404, "channel_not_found", "channel 5 does not exist")
        assert reply.json["channel"] == 5
        assert await messages(client, "a") == []


async def test_named_channels_may_have_to_be_created() -> None:
    """Where the realm says so, a name that was not created does not exist."""
    async with running(channel_implicit=False) as server, connected(server) as client:
        missing = await client.request("POST", "/publish", {"channels": ["a"], "data": 1})
        assert problem(missing) == (404, "channel_not_found", "channel a does not exist")
        assert problem(await client.get("/poll?channel=a&timeout=0"))[1] == "channel_not_found"

        await client.request("POST", "/channels", {"name": "a"})

        await client.publish("a")
        assert len(await messages(client, "a")) == 1


# Idempotency


@pytest.mark.parametrize("header", [True, False])
async def test_a_publication_with_a_key_is_published_once(header: bool) -> None:
    """The same publication with the same key gets the same id, and is said to be a duplicate."""
    async with running() as server, connected(server) as one, connected(server) as other:
        body = {"channels": ["a"], "data": 1, **({} if header else {"key": "k"})}
        headers = "Idempotency-Key: k\r\n" if header else ""

        first = await one.request("POST", "/publish", body, headers)
        second = await other.request("POST", "/publish", body, headers)

        assert (first.status, second.status) == (201, 201)
        assert second.json == {"id": first.json["id"], "duplicate": True}
        assert "duplicate" not in first.json
        assert len(await messages(one, "a")) == 1


async def test_a_key_in_the_header_is_the_key_in_the_body() -> None:
    """It does not matter where the key stands; in both places it has to be the same."""
    async with running() as server, connected(server) as client:
        id = await client.publish("a", data=1, key="k")

        again = await client.request("POST", "/publish", {"channels": ["a"], "data": 1}, "Idempotency-Key: k\r\n")
        both = {"channels": ["a"], "data": 1, "key": "k"}
        twice = await client.request("POST", "/publish", both, "Idempotency-Key: k\r\n")
        differ = await client.request("POST", "/publish", both, "Idempotency-Key: other\r\n")

        assert again.json == twice.json == {"id": id, "duplicate": True}
        assert problem(differ) == (400, "invalid_parameter", "key and the Idempotency-Key header differ")


@pytest.mark.parametrize("change", [{"data": 2}, {"channels": ["b"]}, {"channels": ["a", "b"]}])
async def test_a_key_is_for_one_publication(change: dict[str, Any]) -> None:
    """Another publication with a key that was used is refused."""
    async with running() as server, connected(server) as client:
        await client.publish("a", data=1, key="k")

        reply = await client.request("POST", "/publish", {"channels": ["a"], "data": 1, "key": "k", **change})

        assert problem(reply) == (422, "idempotency_key_reused", "key 'k' was used for a different publication")
        assert len(await messages(client, "a")) == 1


async def test_items_of_a_batch_have_their_own_keys() -> None:
    """In an array a retry is recognised item by item."""
    async with running() as server, connected(server) as client:
        batch = [{"channels": ["a"], "data": n, "key": f"k{n}"} for n in range(2)]

        first = await client.request("POST", "/publish", batch)
        second = await client.request("POST", "/publish", [*batch, {"channels": ["a"], "data": 2, "key": "k2"}])

        ids = [item["id"] for item in first.json]
        assert second.json[:2] == [{"id": id, "duplicate": True} for id in ids]
        assert set(second.json[2]) == {"id"}


async def test_a_batch_takes_no_key_in_the_header() -> None:
    """One key cannot stand for several publications."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", "/publish", [{"channels": ["a"], "data": 1}], "Idempotency-Key: k\r\n")

        assert problem(reply) == (
            400,
            "invalid_request",
            "an array of publications has a key in each item, not an Idempotency-Key header",
        )
        assert await messages(client, "a") == []


@pytest.mark.parametrize("key", ["", "k" * 256, "\xe9", "a\tb"])
async def test_a_key_in_the_header_is_plain_text(key: str) -> None:
    """A key is neither empty nor endless nor of odd characters."""
    async with running() as server, connected(server) as client:
        body = b'{"channels":["a"],"data":1}'
        client.send(
            b"POST /publish HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\nIdempotency-Key: %b\r\n\r\n%b"
            % (len(body), key.encode("latin-1"), body)
        )

        assert refusal(await client.reply()) == (400, "invalid_parameter", "Idempotency-Key")


# Channels


async def test_create_hands_out_an_integer_channel() -> None:
    """Without a name the channel is a new integer, which exists from now on."""
    async with running() as server, connected(server) as client:
        first = await client.request("POST", "/channels", {})
        second = await client.request("POST", "/channels")

        assert (first.status, second.status) == (201, 201)
        channel = first.json["channel"]
        assert isinstance(channel, int)
        assert channel < second.json["channel"] <= MAX_ID
        id = await client.publish(channel, data=1)
        assert await messages(client, channel) == [{"id": id, "channels": [channel], "data": 1}]
        assert (await client.request("POST", "/publish", {"channels": [str(channel)], "data": 2})).status == 201
        assert (await client.get(f"/channels/{channel}")).json["messages"] == 2


async def test_create_tells_how_the_channel_is_kept() -> None:
    """The answer to create is what describe says."""
    async with running() as server, connected(server) as client:
        options = {"name": "a", "ttl": 10, "window": 5.5, "max_messages": 3}

        reply = await client.request("POST", "/channels", options)

        assert reply.status == 201
        info = reply.json
        assert info == {
            "channel": "a",
            "created": info["created"],
            "expires": info["created"] + 10 * SECOND,
            "ttl": 10,
            "window": 5.5,
            "max_messages": 3,
            "messages": 0,
            "first": None,
            "last": None,
        }
        assert (await client.get("/channels/a")).json == info


async def test_describe_counts_what_is_cached() -> None:
    """A channel's first and last id are those of its cached messages."""
    async with running() as server, connected(server) as client:
        await client.request("POST", "/channels", {"name": "a", "max_messages": 2})
        ids = [await client.publish("a", data=n) for n in range(3)]

        info = (await client.get("/channels/a")).json

        assert (info["messages"], info["first"], info["last"]) == (2, ids[1], ids[2])


async def test_a_name_is_taken_once() -> None:
    """A name that exists, created or published to, cannot be created."""
    async with running() as server, connected(server) as client:
        await client.request("POST", "/channels", {"name": "a"})
        await client.publish("b")

        for name in ("a", "b"):
            reply = await client.request("POST", "/channels", {"name": name})
            assert problem(reply) == (409, "channel_exists", f"channel {name} exists already")
            assert reply.json["channel"] == name


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"name": "123"}, "name"),
        ({"name": ""}, "name"),
        ({"name": ".."}, "name"),
        ({"name": "a\u0000"}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"name": None}, "name"),
        ({"name": 5}, "name"),
        ({"ttl": 0}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": "1"}, "ttl"),
        ({"ttl": 1e300}, "ttl"),
        ({"window": -0.1}, "window"),
        ({"window": [1]}, "window"),
        ({"max_messages": 0}, "max_messages"),
        ({"max_messages": 1.5}, "max_messages"),
        ({"max_messages": 2**53}, "max_messages"),
        ({"max_messages": 10**30}, "max_messages"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_options_of_a_channel_are_checked(options: dict[str, Any], parameter: str) -> None:
    """What a channel cannot be is refused, with the name of the parameter."""
    async with running() as server, connected(server) as client:
        assert refusal(await client.request("POST", "/channels", options)) == (400, "invalid_parameter", parameter)
        assert (await client.get("/channels")).json["channels"] == []


async def test_renew_gives_a_channel_its_time_again() -> None:
    """Renewing starts the channel's ttl anew, and may change it for good."""
    async with running() as server, connected(server) as client:
        created = (await client.request("POST", "/channels", {"name": "a", "ttl": 10})).json

        same = await client.request("POST", "/channels/a/renew")
        longer = await client.request("POST", "/channels/a/renew", {"ttl": 60})
        again = await client.request("POST", "/channels/a/renew", {})

        assert [reply.status for reply in (same, longer, again)] == [200] * 3
        assert [reply.json["ttl"] for reply in (same, longer, again)] == [10, 60, 60]
        assert created["expires"] < same.json["expires"] < longer.json["expires"] < again.json["expires"]
        assert again.json["expires"] - created["expires"] >= 50 * SECOND
        assert refusal(await client.request("POST", "/channels/a/renew", {"ttl": 0})) == (
            400,
            "invalid_parameter",
            "ttl",
        )


async def test_close_ends_its_polls() -> None:
    """Closing a channel answers those who wait for it, and the channel is gone."""
    async with running() as server, connected(server) as one, connected(server) as other, connected(server) as client:
        channel = (await client.request("POST", "/channels")).json["channel"]
        one.send(f"GET /poll?channel={channel} HTTP/1.1\r\nHost: test\r\n\r\n")
        await chunked(other, "POST", "/poll", b'{"channels":["b",%d]}' % channel)
        await parked(server, 2)

        closed = await client.request("DELETE", f"/channels/{channel}")

        assert (closed.status, closed.body, closed.headers["cache-control"]) == (204, b"", "no-store")
        assert "content-length" not in closed.headers
        for poller in (one, other):
            answer = (await poller.reply()).json
            assert (answer["messages"], answer["closed"], answer["gap"]) == ([], [channel], False)
        for reply in (
            await client.get(f"/channels/{channel}"),
            await client.get(f"/poll?channel={channel}"),
            await client.request("POST", "/publish", {"channels": [channel], "data": 1}),
            await client.request("DELETE", f"/channels/{channel}"),
            await client.request("POST", f"/channels/{channel}/renew"),
        ):
            assert problem(reply) == (404, "channel_not_found", f"channel {channel} does not exist")


async def test_a_closed_name_may_come_back() -> None:
    """A named channel that was closed comes into being again by being published to."""
    async with running() as server, connected(server) as client:
        await client.publish("a", data=1)
        await client.request("DELETE", "/channels/a")

        await client.publish("a", data=2)

        assert [message["data"] for message in await messages(client, "a")] == [2]


@pytest.mark.parametrize(
    "channel", ["a/b", "a b", "%", "%2F", "{a}", "ü", "😀", "a?b", "a#b", "a+b", "a;b", "'", '"', "~"]
)
async def test_any_name_fits_into_the_path(channel: str) -> None:
    """A channel's name may have any character, percent-encoded in the path."""
    async with running() as server, connected(server) as client:
        await client.publish(channel)
        path = f"/channels/{quote(channel, safe='')}"

        described = await client.get(path)
        renewed = await client.request("POST", f"{path}/renew")
        closed = await client.request("DELETE", path)

        assert (described.status, described.json["channel"]) == (200, channel)
        assert (renewed.status, renewed.json["channel"]) == (200, channel)
        assert closed.status == 204


async def test_channels_are_listed_page_by_page() -> None:
    """Each page says where the next begins; the last says null."""
    async with running() as server, connected(server) as client:
        names = [f"c{n:03}" for n in range(7)]
        for name in reversed(names):
            await client.publish(name)
        seen: list[str] = []
        sizes = []
        after: str | None = ""

        while after is not None:
            reply = await client.get(f"/channels?limit=3&after={after}")
            assert reply.status == 200
            seen += [info["channel"] for info in reply.json["channels"]]
            sizes.append(len(reply.json["channels"]))
            after = reply.json["next"]

        assert seen == names
        assert sizes == [3, 3, 1]


async def test_a_page_that_ends_with_the_last_channel_is_the_last() -> None:
    """There is no empty page at the end."""
    async with running() as server, connected(server) as client:
        for name in ("a", "b"):
            await client.publish(name)

        reply = await client.get("/channels?limit=2")

        assert [info["channel"] for info in reply.json["channels"]] == ["a", "b"]
        assert reply.json["next"] is None
        assert (await client.get("/channels?after=b")).json == {"channels": [], "next": None}


async def test_integer_channels_are_listed_as_integers() -> None:
    """A listing shows a channel as everything else does, and a page may end with an integer channel."""
    async with running() as server, connected(server) as client:
        channels = [(await client.request("POST", "/channels")).json["channel"] for _ in range(2)]

        first = (await client.get("/channels?limit=1")).json
        second = (await client.get(f"/channels?limit=1&after={first['next']}")).json

        assert [first["channels"][0]["channel"], second["channels"][0]["channel"]] == channels


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        *(
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit=-1", "limit"),
            ("limit=1.0", "limit"),
            ("limit=", "limit"),
        ),
        *(
            ("limit=%2B1", "limit"),
            ("limit=1_0", "limit"),
            ("limit=%D9%A1", "limit"),
            ("limit=99999999999999", "limit"),
        ),
        *(("limit=1&limit=2", "limit"), ("after=a&after=b", "after"), ("offset=1", "offset")),
    ],
)
async def test_a_listing_is_asked_for_properly(query: str, parameter: str) -> None:
    """Whatever is no page of a listing is refused, with the name of the parameter."""
    async with running() as server, connected(server) as client:
        assert refusal(await client.get(f"/channels?{query}")) == (400, "invalid_parameter", parameter)


# Errors


@pytest.mark.parametrize(
    "target", ["/", "/nothing", "/poll/", "/channels/", "/channels/a/b", "/channels/a/renew/x", "/Poll"]
)
async def test_what_is_nowhere_is_404(target: str) -> None:
    """A path that does not exist is said so."""
    async with running() as server, connected(server) as client:
        reply = await client.get(target)

        assert problem(reply) == (404, "not_found", f"there is nothing at {target}")
        assert reply.json["title"] == "Not Found"
        assert refused(server) == {"not_found": 1}


async def test_a_long_path_is_not_repeated_whole() -> None:
    """An error does not echo more of a path than a person reads."""
    async with running() as server, connected(server) as client:
        reply = await client.get("/" + "x" * 5000)

        assert problem(reply) == (404, "not_found", "there is nothing at /" + "x" * 199)


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("DELETE", "/poll", "GET,HEAD,POST"),
        ("OPTIONS", "/poll", "GET,HEAD,POST"),
        ("GET", "/publish", "POST"),
        ("PUT", "/publish", "POST"),
        ("DELETE", "/channels", "GET,HEAD,POST"),
        ("POST", "/channels/a", "DELETE,GET,HEAD"),
        ("PATCH", "/channels/a", "DELETE,GET,HEAD"),
        ("GET", "/channels/a/renew", "POST"),
        ("POST", "/openapi.json", "GET,HEAD"),
    ],
)
async def test_a_method_that_does_not_fit_is_405(method: str, target: str, allow: str) -> None:
    """The answer says which methods do."""
    async with running() as server, connected(server) as client:
        reply = await client.request(method, target)

        assert problem(reply) == (405, "method_not_allowed", f"{target} does not take {method}")
        assert reply.headers["allow"] == allow


@pytest.mark.parametrize(
    "target", ["/channels", "/channels/a", "/openapi.json", "/channels/nothing", "/nothing", "/publish"]
)
async def test_head_is_get_without_the_body(target: str) -> None:
    """HEAD has the status and the headers of GET."""
    async with running() as server, connected(server) as client:
        await client.publish("a")

        got = await client.get(target)
        head = await client.request("HEAD", target)

        assert (head.status, head.body) == (got.status, b"")
        same = ("content-type", "cache-control", "allow")
        assert [head.headers.get(name) for name in same] == [got.headers.get(name) for name in same]
        assert int(head.headers["content-length"]) == len(got.body) + (target == "/publish")


async def test_a_failure_is_logged_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What went wrong inside is for the log; the client is told that something did."""
    async with running() as server, connected(server) as client:

        async def fail(name: str) -> ChannelInfo:
            raise RuntimeError("a secret")

        monkeypatch.setattr(server.node.broker, "describe", fail)
        with caplog.at_level(logging.ERROR, "pushup.web"):
            reply = await client.get("/channels/a")

        assert problem(reply) == (500, "internal_error", "something went wrong here; the log says what")
        assert b"secret" not in reply.body
        assert [record.getMessage() for record in caplog.records] == ["a request failed"]
        assert "a secret" in caplog.text
        assert refused(server) == {"internal_error": 1}
        assert (await client.get("/channels")).status == 200


async def test_what_is_no_http_is_refused() -> None:
    """Bytes that are not HTTP get a problem document, and the connection ends."""
    async with running() as server, connected(server) as client:
        client.send(b"hello\r\n\r\n")

        reply = await client.reply()

        assert (reply.status, reply.headers["content-type"]) == (400, "application/problem+json")
        assert reply.headers["server"] == "PushUp"
        assert reply.json["detail"] == "the request is not well-formed HTTP"
        assert await client.rest() == b""


async def test_a_body_in_broken_chunks_is_refused_at_once() -> None:
    """A chunk that is wrong is seen when it comes, not when the time for the body is over."""
    async with running() as server:
        for connect in (pipes.lane, pipes.aiohttp):
            client = connect(server)
            head = b"POST /publish HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"

            (response,) = await client.receive(head, b"5\r\nhello\r\n", b"zz\r\n", b"more")

            assert (response.status, response.headers["connection"]) == (400, "close")
            assert response.json["detail"] == "the request is not well-formed HTTP"
            assert client.closing


async def test_a_body_that_does_not_come_is_refused() -> None:
    """A client has request_timeout to send a body, also on a connection that is the web side's."""
    async with running(request_timeout=0.05) as server, connected(server) as client:
        client.send("POST /publish HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n")

        assert problem(await client.reply()) == (408, "request_timeout", "the request's body did not come in time")


@pytest.mark.parametrize("target", ["/publish", "/poll", "/channels", "/channels/a/renew"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x", "identity, gzip", "\xff"])
async def test_a_body_is_sent_as_it_is(target: str, encoding: str) -> None:
    """A compressed body is refused, whatever is in it, and the connection goes on."""
    async with running() as server, connected(server) as client:
        client.send(f"POST {target} HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n".encode())
        client.send(b"Content-Encoding: %b\r\n\r\n{}" % encoding.encode("latin-1"))

        detail = "a request's body is sent as it is, without a Content-Encoding"
        assert problem(await client.reply()) == (400, "invalid_request", detail)
        assert (await client.get("/channels")).status == 200


@pytest.mark.parametrize("target", ["/publish", "/poll", "/nothing", "/channels"])
async def test_an_unknown_expectation_is_refused(target: str) -> None:
    """A client that expects what nobody knows is told so, and the connection ends: its body may never come."""
    async with running() as server, connected(server) as client:
        client.send(f"POST {target} HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\nExpect: magic\r\n\r\n")

        reply = await client.reply()

        assert problem(reply) == (400, "invalid_request", "Unknown Expect: magic")
        assert reply.headers["connection"] == "close"


async def test_an_expectation_of_odd_bytes_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """It is the client's fault, not one of the server's."""
    async with running() as server, connected(server) as client:
        client.send(b"POST /publish HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\nExpect: \xff\r\n\r\n{}")

        assert problem(await client.reply())[:2] == (400, "invalid_request")
        assert not caplog.records


async def test_a_client_that_vanishes_within_a_body_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Half a publication is nothing, and nothing to log."""
    async with running() as server:
        for connect in (pipes.lane, pipes.aiohttp):
            client = connect(server)
            await client.receive(b"POST /publish HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n{")

            client.hang_up()
            await client.settle()

        assert not caplog.records
        assert refused(server) == {}


async def test_openapi_is_served() -> None:
    """The API's own description is JSON."""
    async with running() as server, connected(server) as client:
        reply = await client.get("/openapi.json")

        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        assert isinstance(reply.json, dict)


# JSON that is none

BROKEN = {
    "nothing": b"",
    "white space": b" \n",
    "truncated": b'{"channels":["a"],"data":1',
    "truncated string": b'{"channels":["a',
    "trailing garbage": b'{"channels":["a"],"data":1}x',
    "two values": b'{"channels":["a"],"data":1} {}',
    "trailing comma": b'{"channels":["a"],"data":1,}',
    "single quotes": b"{'channels':['a'],'data':1}",
    "comment": b'/**/{"channels":["a"],"data":1}',
    "byte order mark": b'\xef\xbb\xbf{"channels":["a"],"data":1}',
    "UTF-16": '{"channels":["a"],"data":1}'.encode("utf-16"),
    "invalid UTF-8": b'{"channels":["\xff"],"data":1}',
    "invalid UTF-8 in a member's name": b'{"channels":["a"],"\xff":1}',
    "control character": b'{"channels":["a\x01"],"data":1}',
    "lone surrogate": b'{"channels":["\\ud800"],"data":1}',
    "wrong escape": b'{"channels":["\\x"],"data":1}',
    "NaN": b'{"channels":["a"],"data":NaN}',
    "Infinity": b'{"channels":["a"],"data":-Infinity}',
    "leading zero": b'{"channels":["a"],"data":01}',
    "deep nesting": b'{"channels":["a"],"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep nesting that does not end": b"[" * 100_000,
    "null": b"null",
    "a number": b"1",
    "a string": b'"channels"',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (target, name)
        for target in ("/publish", "/poll", "/channels", "/channels/a/renew")
        for name in BROKEN
        if name != "nothing" or target in ("/publish", "/poll")
    ],
)
async def test_what_is_no_json_object_is_refused(target: str, name: str) -> None:
    """Broken JSON is the client's fault on every route, and nothing else breaks."""
    async with running() as server, connected(server) as client:
        status, code, _ = problem(await client.request("POST", target, BROKEN[name]))

        assert (status, code) in ((400, "invalid_request"), (400, "invalid_parameter"))
        assert (await client.get("/channels")).json["channels"] == []


@pytest.mark.parametrize(
    "data",
    [
        b'"\xff"',
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'["\\ud83d"]',
        b'{"\\ud800":1}',
        b"1e999",
        b"[1e400]",
        b'"\x7f\x00"',
    ],
)
async def test_data_that_no_reader_could_take_is_refused(data: bytes) -> None:
    """A message is valid through and through, or it is not published."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", "/publish", b'{"channels":["a"],"data":%b}' % data)

        assert problem(reply)[0] == 400
        assert await messages(client, "a") == []


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"data": 1}, "channels"),
        ({"channels": ["a"]}, "data"),
        ({"channels": [], "data": 1}, "channels"),
        ({"channels": "a", "data": 1}, "channels"),
        ({"channels": None, "data": 1}, "channels"),
        ({"channels": ["a", None], "data": 1}, "channels"),
        ({"channels": [True], "data": 1}, "channels"),
        ({"channels": [1.5], "data": 1}, "channels"),
        ({"channels": [["a"]], "data": 1}, "channels"),
        ({"channels": [0], "data": 1}, "channels"),
        ({"channels": [-1], "data": 1}, "channels"),
        ({"channels": [2**53], "data": 1}, "channels"),
        ({"channels": [2**64], "data": 1}, "channels"),
        ({"channels": [10**400], "data": 1}, "channels"),
        ({"channels": ["0"], "data": 1}, "channels"),
        ({"channels": ["007"], "data": 1}, "channels"),
        ({"channels": [str(2**53)], "data": 1}, "channels"),
        ({"channels": [""], "data": 1}, "channels"),
        ({"channels": ["a\nb"], "data": 1}, "channels"),
        ({"channels": ["ü" * 128], "data": 1}, "channels"),
        ({"channels": ["a"], "data": 1, "key": ""}, "key"),
        ({"channels": ["a"], "data": 1, "key": "k" * 256}, "key"),
        ({"channels": ["a"], "data": 1, "key": 7}, "key"),
        ({"channels": ["a"], "data": 1, "key": None}, "key"),
        ({"channels": ["a"], "data": 1, "Data": 2}, "Data"),
    ],
)
async def test_a_wrong_publication_names_the_parameter(body: Any, parameter: str) -> None:
    """What is missing, unknown or of the wrong kind is named."""
    async with running() as server, connected(server) as client:
        assert refusal(await client.request("POST", "/publish", body)) == (400, "invalid_parameter", parameter)
        assert server.node.metrics.publications == 0


async def test_the_last_of_equal_members_counts() -> None:
    """A member that stands twice in an object is taken as JSON readers take it."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", "/publish", b'{"channels":["b"],"data":1,"channels":["a"],"data":2}')

        assert reply.status == 201
        assert [message["data"] for message in await messages(client, "a")] == [2]
        assert await messages(client, "b") == []


# Polls, on either side

WRONG_POLLS: Sequence[tuple[dict[str, Any], str]] = [
    ({"start": -1}, "start"),
    ({"start": 2**53}, "start"),
    ({"start": 10**30}, "start"),
    ({"start": 1.5}, "start"),
    ({"start": "now"}, "start"),
    ({"start": ""}, "start"),
    ({"end": -1}, "end"),
    ({"end": 2**53}, "end"),
    ({"end": "latest"}, "end"),
    ({"start": 2, "end": 1}, "start"),
    ({"timeout": -1}, "timeout"),
    ({"timeout": 1e300}, "timeout"),
    ({"timeout": "soon"}, "timeout"),
    ({"colour": "red"}, "colour"),
]


@pytest.mark.parametrize(("fields", "parameter"), WRONG_POLLS)
async def test_a_wrong_poll_names_the_parameter(fields: dict[str, Any], parameter: str) -> None:
    """Query or body, lane or web side: the same poll is refused with the same words."""
    async with running() as server, connected(server) as client:
        query = "&".join(f"{name}={value}" for name, value in fields.items())
        body = json.dumps({"channels": ["a"], **fields}).encode()

        replies = [
            await client.get(f"/poll?channel=a&{query}"),
            await client.get(f"http://test/poll?channel=a&{query}"),
            await client.request("POST", "/poll", body),
        ]
        await chunked(client, "POST", "/poll", body)
        replies.append(await client.reply())

        assert [refusal(reply) for reply in replies] == [(400, "invalid_parameter", parameter)] * 4
        assert len({reply.body for reply in replies}) == 1


@pytest.mark.parametrize(
    "fields",
    [
        *({"start": 0}, {"start": 2**53 - 1}, {"start": "latest"}, {"end": 2**53 - 1}, {"start": 5, "end": 5}),
        *({"timeout": 0.0}, {"timeout": 1e9}, {"start": 1, "end": 2, "timeout": 120}),
    ],
)
async def test_a_poll_at_the_limits_is_taken(fields: dict[str, Any]) -> None:
    """The smallest and the largest values are values."""
    async with running(poll_timeout_max=0, poll_timeout=0) as server, connected(server) as client:
        query = "&".join(f"{name}={value}" for name, value in fields.items())

        by_query = await client.get(f"/poll?channel=a&{query}")
        by_body = await client.request("POST", "/poll", {"channels": ["a"], **fields})

        assert [by_query.status, by_body.status] == [200, 200]
        assert by_query.json["messages"] == by_body.json["messages"] == []


def _slow(line: str, *headers: str, body: str = "") -> str:
    return f"{line}\r\n" + "".join(f"{header}\r\n" for header in ("Host: test", *headers)) + f"\r\n{body}"


_QUERY = "channel=a&start=latest"
_BODY = '{"channels":["a"],"start":"latest"}'

SLOW_ROADS = {
    "chunked POST": _slow(
        "POST /poll HTTP/1.1", "Transfer-Encoding: chunked", body=f"{len(_BODY):x}\r\n{_BODY}\r\n0\r\n\r\n"
    ),
    "chunked GET": _slow(f"GET /poll?{_QUERY} HTTP/1.1", "Transfer-Encoding: chunked", body="0\r\n\r\n"),
    "absolute-form": _slow(f"GET http://test/poll?{_QUERY} HTTP/1.1"),
    "percent-encoded path": _slow(f"GET /%70oll?{_QUERY} HTTP/1.1"),
    "a body on a GET": _slow(f"GET /poll?{_QUERY} HTTP/1.1", "Content-Length: 5", body="hello"),
    "an offer of WebSocket": _slow(f"GET /poll?{_QUERY} HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket"),
    "HTTP/1.0": _slow(f"GET /%70oll?{_QUERY} HTTP/1.0", "Connection: keep-alive"),
}


LAST_OF_THEIR_CONNECTION = {"chunked POST", "chunked GET", "an offer of WebSocket"}


@pytest.mark.parametrize("name", SLOW_ROADS)
async def test_the_web_side_parks_and_answers_polls(name: str) -> None:
    """A poll that cannot take the lane is parked and answered all the same; its connection goes on if it was framed."""
    rounds = 1 if name in LAST_OF_THEIR_CONNECTION else 2
    async with running() as server, connected(server) as poller, connected(server) as publisher:
        for _ in range(rounds):
            poller.send(SLOW_ROADS[name])
            await parked(server, 1)
            id = await publisher.publish("a", data="x")

            reply = await poller.reply()

            assert reply.status == 200
            assert reply.json == {
                "messages": [{"id": id, "channels": ["a"], "data": "x"}],
                "next": id + 1,
                "gap": False,
            }
            assert reply.headers["cache-control"] == "no-store"
            assert (reply.headers.get("connection") == "close") == (rounds == 1)
        assert server.metrics.requests_lane == rounds  # The publications.


@pytest.mark.parametrize("name", SLOW_ROADS)
async def test_the_web_side_frees_the_poll_of_a_vanished_client(name: str) -> None:
    """A client that goes away is noticed at once there too."""
    async with running() as server:
        async with connected(server) as client:
            client.send(SLOW_ROADS[name])
            await parked(server, 1)

        await parked(server, 0)

        assert server.node.metrics.answers["gone"] == 1


async def test_the_web_side_ends_polls_in_time() -> None:
    """A poll's own timeout holds there too."""
    async with running() as server, connected(server) as client:
        client.send("GET http://test/poll?channel=a&timeout=0.05 HTTP/1.1\r\nHost: test\r\n\r\n")

        reply = await client.reply()

        assert (reply.status, reply.json["messages"], reply.json["gap"]) == (200, [], False)


async def test_the_web_side_says_that_a_channel_does_not_exist() -> None:
    """An integer channel that is unknown fails a poll there too."""
    async with running() as server, connected(server) as client:
        await chunked(client, "POST", "/poll", b'{"channels":["a",5]}')

        assert problem(await client.reply()) == (404, "channel_not_found", "channel 5 does not exist")
        assert server.node.parked == 0


async def test_the_web_side_drains_its_polls() -> None:
    """When the server stops, polls on the web side are answered and told to close as well."""
    async with running() as server, connected(server) as client:
        await client.get("/poll?channel=a&timeout=0")
        await chunked(client, "POST", "/poll", b'{"channels":["a"]}')
        await parked(server, 1)

        await server.stop(0)

        reply = await client.reply()
        assert (reply.status, reply.json["messages"], reply.headers["connection"]) == (200, [], "close")
        assert await client.rest() == b""


async def test_many_connections_publish_and_poll_at_once() -> None:
    """Under concurrency every message reaches every poll of its channel, once."""
    async with running() as server:

        async def follow(count: int) -> list[Any]:
            seen: list[Any] = []
            cursor = 0
            async with connected(server) as client:
                while len(seen) < count:
                    answer = (await client.get(f"/poll?channel=a&start={cursor}")).json
                    assert not answer["gap"]
                    seen += [message["data"] for message in answer["messages"]]
                    cursor = answer["next"]
            return seen

        async def say(prefix: int) -> None:
            async with connected(server) as client:
                for n in range(20):
                    await client.publish("a", data=prefix * 100 + n)

        followers = [asyncio.create_task(follow(100)) for _ in range(5)]
        await asyncio.gather(*[say(prefix) for prefix in range(5)])
        results = await asyncio.gather(*followers)

        assert all(result == results[0] for result in results)
        assert sorted(results[0]) == sorted(prefix * 100 + n for prefix in range(5) for n in range(20))


async def test_errors_are_counted_by_code() -> None:
    """Every error that is answered is counted under its code."""
    async with running() as server, connected(server) as client:
        await client.get("/nothing")
        await client.get("/publish")
        await client.get("/channels/a")
        await client.request("POST", "/publish", b"{")
        await client.get("/poll?channel=5")

        assert refused(server) == {
            "not_found": 1,
            "method_not_allowed": 1,
            "channel_not_found": 2,
            "invalid_request": 1,
        }


async def test_a_publication_that_the_broker_refuses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused publication is no publication."""
    async with running() as server, connected(server) as client:
        await client.publish("a", data=1, key="k")
        await client.publish("a", data=1, key="k")
        await client.request("POST", "/publish", {"channels": ["a"], "data": 2, "key": "k"})

        metrics = server.node.metrics
        counts = (metrics.publications, metrics.publications_duplicate, metrics.publications_refused)
        assert counts == (1, 1, 1)


async def test_a_result_may_be_any_error_of_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an array an error of the broker is one item's, with status and code."""
    async with running() as server, connected(server) as client:

        def submit(publications: Sequence[Any], tell: Callable[[Sequence[Any]], None]) -> None:
            tell([PushUpError("no") for _ in publications])

        monkeypatch.setattr(server.node.broker, "submit", submit)
        reply = await client.request("POST", "/publish", [{"channels": ["a"], "data": 1}])

        assert [item["error"]["code"] for item in reply.json] == ["internal_error"]


async def test_the_javascript_client_is_served() -> None:
    """To any page, with a tag by which a browser need not load it again."""
    async with running() as server, connected(server) as client:
        reply = await client.request("GET", "/pushup.js", headers="Origin: https://elsewhere.example\r\n")
        tag = reply.headers["etag"]
        again = await client.request("GET", "/pushup.js", headers=f"If-None-Match: {tag}\r\n")
        other = await client.request("GET", "/pushup.js", headers='If-None-Match: "other"\r\n')

        assert (reply.status, reply.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
        assert reply.headers["access-control-allow-origin"] == "*"
        assert b"export class PushUp" in reply.body
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
        assert other.status == 200
