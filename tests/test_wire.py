"""Requests from bytes, answers to JSON: what is taken, what is refused, and in which words."""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pushup.errors import ChannelNotFound, InvalidParameter, InvalidRequest, PushUpError, TooLarge
from pushup.messages import LATEST, MAX_ID, Answer, ChannelInfo, ChannelOptions, Message, Poll, Publication, Receipt
from pushup.settings import Settings
from pushup.wire import (
    Frame,
    find_token,
    is_batch,
    parse_channel_options,
    parse_frame,
    parse_page,
    parse_poll_body,
    parse_poll_query,
    parse_publication,
    parse_publications,
    parse_renewal,
    parse_segment,
    parse_stream_query,
    parse_token_query,
    show_info,
    show_page,
    show_receipt,
)
from tests.support import connected, running

SETTINGS = Settings(poll_timeout=25.0, poll_timeout_max=120.0, poll_channels_max=3, publish_channels_max=3)

START = f"start is an id between 0 and {MAX_ID}, or latest"
END = f"end is an id between 0 and {MAX_ID}"
TIMEOUT = "timeout is a number of seconds between 0 and 1000000000"
TTL = "ttl is a number of seconds above 0, up to 1000000000"
WINDOW = "window is a number of seconds between 0 and 1000000000"
MAX_MESSAGES = f"max_messages is an integer between 1 and {MAX_ID}"
KEY = "key is a string of 1 to 255 characters"
NAME = "name is a string: the name of the channel to create"
CHANNELS = "channels is an array of channels: a string for a named one, an integer for one that was handed out"
SURROGATE = "a \\u escape is one half of a surrogate pair, without the other"


def said(error: PushUpError) -> tuple[str, str | None, str]:
    """What a client is told: code, parameter, sentence."""
    return error.code, error.members.get("parameter"), error.detail


def refusal(parse: Any, *arguments: Any) -> tuple[str, str | None, str]:
    with pytest.raises(InvalidRequest) as caught:
        parse(*arguments)
    assert caught.value.status == 400
    return said(caught.value)


def publication(data: bytes) -> bytes:
    return b'{"channels":["a"],"data":%b}' % data


class TestPollQuery:
    @pytest.mark.parametrize(
        ("query", "poll"),
        [
            ("channel=a", Poll(("a",), 0, MAX_ID, 25.0)),
            ("channel=b&channel=a", Poll(("b", "a"), 0, MAX_ID, 25.0)),
            ("channel=a&channel=b&channel=a", Poll(("a", "b"), 0, MAX_ID, 25.0)),
            ("channel=17", Poll(("17",), 0, MAX_ID, 25.0)),
            ("start=5&channel=a&end=7&timeout=3", Poll(("a",), 5, 7, 3.0)),
            ("channel=a&start=0&end=0", Poll(("a",), 0, 0, 25.0)),
            (f"channel=a&start={MAX_ID}&end={MAX_ID}", Poll(("a",), MAX_ID, MAX_ID, 25.0)),
            ("channel=a&start=latest", Poll(("a",), LATEST, MAX_ID, 25.0)),
            ("channel=a&start=latest&end=0", Poll(("a",), LATEST, 0, 25.0)),
            ("channel=a&timeout=0", Poll(("a",), 0, MAX_ID, 0.0)),
            ("channel=a&timeout=0.5", Poll(("a",), 0, MAX_ID, 0.5)),
            ("channel=a&timeout=1e1", Poll(("a",), 0, MAX_ID, 10.0)),
            ("channel=a&timeout=25E-1", Poll(("a",), 0, MAX_ID, 2.5)),
            ("channel=a&timeout=1e%2B1", Poll(("a",), 0, MAX_ID, 10.0)),
            ("channel=a&timeout=120.5", Poll(("a",), 0, MAX_ID, 120.0)),
            ("channel=a&timeout=1000000000", Poll(("a",), 0, MAX_ID, 120.0)),
            ("&&channel=a&&", Poll(("a",), 0, MAX_ID, 25.0)),
        ],
    )
    def test_taken(self, query: str, poll: Poll) -> None:
        """Parameters in any order; channels once each, in the order given; too long a wait is cut."""
        assert parse_poll_query(query, SETTINGS) == poll

    @pytest.mark.parametrize(
        ("query", "name"),
        [
            ("channel=a+b", "a b"),
            ("channel=a%20b", "a b"),
            ("channel=a%2Bb", "a+b"),
            ("channel=a=b", "a=b"),
            ("channel=a%26b", "a&b"),
            ("channel=a%2525", "a%25"),
            ("channel=%C3%A9", "é"),
            ("channel=%f0%9F%98%80", "😀"),
            ("%63hannel=a", "a"),
            ("channel=a;b", "a;b"),
            ("channel=a/b", "a/b"),
            ("channel=%E2%80%A8", "\u2028"),
        ],
    )
    def test_percent_encoding(self, query: str, name: str) -> None:
        """A form's encoding: plus is a blank, percent-encoded bytes are UTF-8, and each is decoded once."""
        assert parse_poll_query(query, SETTINGS).channels == (name,)

    @pytest.mark.parametrize(
        ("query", "sentence"),
        [
            ("channel=%zz", "%zz in the query is not a percent-encoded byte"),
            ("channel=a%4", "%4 in the query is not a percent-encoded byte"),
            ("channel=a%", "% in the query is not a percent-encoded byte"),
            ("channel=%+1", "% 1 in the query is not a percent-encoded byte"),
            ("%xchannel=a", "%xc in the query is not a percent-encoded byte"),
            ("channel=%FF", "the query is not UTF-8 when percent-decoded"),
            ("channel=%C3", "the query is not UTF-8 when percent-decoded"),
            ("channel=%ED%A0%80", "the query is not UTF-8 when percent-decoded"),
            ("channel=%C0%AF", "the query is not UTF-8 when percent-decoded"),
        ],
    )
    def test_wrong_encoding(self, query: str, sentence: str) -> None:
        """What is not the encoding of UTF-8 text is refused, never guessed at."""
        assert refusal(parse_poll_query, query, SETTINGS) == ("invalid_request", None, sentence)

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "-1",
            "+5",
            "1.5",
            "1.0",
            "1e3",
            "1_000",
            "%201",
            "0x10",
            "05",
            "00",
            "Latest",
            "none",
            "NaN",
            "%D9%A3",
            "%EF%BC%95",
            str(2**53),
            "9" * 16,
            "1" * 17,
            "1" * 5000,
        ],
    )
    @pytest.mark.parametrize(("parameter", "sentence"), [("start", START), ("end", END)])
    def test_wrong_ids(self, parameter: str, sentence: str, value: str) -> None:
        """An id is written as JSON writes an integer, and is exact in a double."""
        query = f"channel=a&{parameter}={value}"

        assert refusal(parse_poll_query, query, SETTINGS) == ("invalid_parameter", parameter, sentence)

    def test_the_end_is_never_latest(self) -> None:
        """Only `start` takes the word."""
        assert refusal(parse_poll_query, "channel=a&end=latest", SETTINGS) == ("invalid_parameter", "end", END)

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "-1",
            "-1e-9",
            "%2B1",
            ".5",
            "5.",
            "05",
            "1_0",
            "%205",
            "nan",
            "inf",
            "1e",
            "1e999",
            "1000000000.1",
            "%D9%A3",
        ],
    )
    def test_wrong_timeouts(self, value: str) -> None:
        """A timeout is written as JSON writes a number."""
        query = f"channel=a&timeout={value}"

        assert refusal(parse_poll_query, query, SETTINGS) == ("invalid_parameter", "timeout", TIMEOUT)

    @pytest.mark.parametrize(
        ("query", "parameter", "sentence"),
        [
            ("", "channel", "a poll names at least one channel"),
            ("start=5", "channel", "a poll names at least one channel"),
            ("channel", "channel", "a channel's name is not empty, '.' or '..'"),
            ("channel=", "channel", "a channel's name is not empty, '.' or '..'"),
            ("channel=a&channel=", "channel", "a channel's name is not empty, '.' or '..'"),
            ("channel=%00", "channel", "a channel's name has no control characters"),
            ("channel=a&start=1&start=1", "start", "start is given more than once"),
            ("channel=a&end=1&end=1", "end", "end is given more than once"),
            ("channel=a&timeout=1&timeout=1", "timeout", "timeout is given more than once"),
            ("channel=a&start=6&end=5", "start", "start lies after end, so the range is empty"),
            ("channel=a&since=5", "since", "'since' is not a parameter of a poll"),
            ("channel=a&Start=5", "Start", "'Start' is not a parameter of a poll"),
            ("channel=a&channels=b", "channels", "'channels' is not a parameter of a poll"),
            ("channel=a&=5", "", "'' is not a parameter of a poll"),
            ("channel=a&=", "", "'' is not a parameter of a poll"),
            ("channel=a&a%0Ab=5", "a\nb", "'a\\nb' is not a parameter of a poll"),
            (f"channel=a&{'x' * 200}=5", "x" * 100, f"'{'x' * 100}' is not a parameter of a poll"),
        ],
    )
    def test_wrong_parameters(self, query: str, parameter: str, sentence: str) -> None:
        """The error names the parameter; of an unknown one no more than a hundred characters."""
        assert refusal(parse_poll_query, query, SETTINGS) == ("invalid_parameter", parameter, sentence)

    @given(st.text())
    @settings(derandomize=True, deadline=None)
    def test_never_anything_but_a_poll_or_an_error(self, query: str) -> None:
        """No text whatever makes it fail otherwise."""
        try:
            poll = parse_poll_query(query, SETTINGS)
        except InvalidRequest:
            return
        assert 0 < len(poll.channels) <= 3


@pytest.mark.parametrize(
    "parse",
    [
        lambda: parse_poll_query("channel=a&channel=b&channel=c&channel=d", SETTINGS),
        lambda: parse_poll_query("channel=a&channel=a&channel=a&channel=a", SETTINGS),
        lambda: parse_poll_body(b'{"channels":["b",17,"17","b"]}', SETTINGS),
        lambda: parse_publication(b'{"channels":["a","b","c","d"],"data":1}', SETTINGS),
        lambda: parse_publication(b'{"channels":["a","a","a","a"],"data":1}', SETTINGS),
    ],
)
def test_too_many_channels(parse: Callable[[], object]) -> None:
    """More channels than the settings allow are too large a request, repeated ones included."""
    with pytest.raises(TooLarge, match=r"a (poll|publication) names at most 3 channels"):
        parse()


@pytest.mark.parametrize(
    ("query", "token"),
    [
        ("channel=a", None),
        ("channel=token", None),
        ("tokens=x", None),
        ("channel=a&token=a.b-_c", "a.b-_c"),
        ("token=a%2Eb&channel=a", "a.b"),
        ("token=a&token=b", "a"),
        ("token=", ""),
        ("token", None),
    ],
)
def test_a_token_in_the_query(query: str, token: str | None) -> None:
    """Found as it is meant; whether it may be there twice is the poll's parser's business."""
    assert find_token(query) == token


def test_a_token_is_no_part_of_a_poll() -> None:
    """It says who asks, not what for."""
    assert parse_poll_query("channel=a&token=x", SETTINGS) == parse_poll_query("channel=a", SETTINGS)


class TestPollBody:
    @pytest.mark.parametrize(
        ("body", "poll"),
        [
            (b'{"channels":["a"]}', Poll(("a",), 0, MAX_ID, 25.0)),
            (b'{"channels":["b",17,"17"]}', Poll(("b", "17"), 0, MAX_ID, 25.0)),
            (b' {"timeout" : 3, "end":7,\n"start":5, "channels" : ["\\u00e9"] } ', Poll(("é",), 5, 7, 3.0)),
            (b'{"channels":["a"],"start":"latest","timeout":0.5}', Poll(("a",), LATEST, MAX_ID, 0.5)),
            (b'{"channels":["a"],"start":-0,"timeout":-0.0}', Poll(("a",), 0, MAX_ID, -0.0)),
            (b'{"channels":["a"],"start":9007199254740991}', Poll(("a",), MAX_ID, MAX_ID, 25.0)),
            (b'{"channels":["a"],"timeout":1e9}', Poll(("a",), 0, MAX_ID, 120.0)),
            (b'{"channels":["x"],"channels":["a"]}', Poll(("a",), 0, MAX_ID, 25.0)),
        ],
    )
    def test_taken(self, body: bytes, poll: Poll) -> None:
        """The same as in a query; an integer channel is a number or its digits."""
        assert parse_poll_body(body, SETTINGS) == poll

    @pytest.mark.parametrize(
        ("members", "parameter", "sentence"),
        [
            ('"start":-1', "start", START),
            ('"start":1.5', "start", START),
            ('"start":1.0', "start", START),
            ('"start":1e3', "start", START),
            ('"start":9007199254740992', "start", START),
            (f'"start":{"1" * 5000}', "start", START),
            ('"start":1e999', "start", START),
            ('"start":true', "start", START),
            ('"start":null', "start", START),
            ('"start":"5"', "start", START),
            ('"start":""', "start", START),
            ('"start":[5]', "start", START),
            ('"end":-1', "end", END),
            ('"end":"latest"', "end", END),
            ('"end":false', "end", END),
            ('"end":null', "end", END),
            ('"end":9007199254740992', "end", END),
            ('"timeout":-1', "timeout", TIMEOUT),
            ('"timeout":"5"', "timeout", TIMEOUT),
            ('"timeout":true', "timeout", TIMEOUT),
            ('"timeout":null', "timeout", TIMEOUT),
            ('"timeout":1e10', "timeout", TIMEOUT),
            ('"timeout":1e999', "timeout", TIMEOUT),
            ('"start":6,"end":5', "start", "start lies after end, so the range is empty"),
            ('"since":5', "since", "'since' is not a parameter of a poll"),
            ('"":5', "", "'' is not a parameter of a poll"),
            ('"x` - at `$.start":5', "x` - at `$.start", "'x` - at `$.start' is not a parameter of a poll"),
            (f'"{"x" * 200}":5', "x" * 100, f"'{'x' * 100}' is not a parameter of a poll"),
        ],
    )
    def test_wrong_members(self, members: str, parameter: str, sentence: str) -> None:
        """Wrong types, wrong ranges and unknown members are refused in the words of the query."""
        body = f'{{"channels":["a"],{members}}}'.encode()

        assert refusal(parse_poll_body, body, SETTINGS) == ("invalid_parameter", parameter, sentence)

    @pytest.mark.parametrize(
        ("body", "sentence"),
        [
            (b"{}", f"channels is missing: it is {CHANNELS.removeprefix('channels is ')}"),
            (b'{"channels":[]}', "a poll names at least one channel"),
            (b'{"channels":"a"}', CHANNELS),
            (b'{"channels":null}', CHANNELS),
            (b'{"channels":[null]}', CHANNELS),
            (b'{"channels":[true]}', CHANNELS),
            (b'{"channels":[1.5]}', CHANNELS),
            (b'{"channels":[1.0]}', CHANNELS),
            (b'{"channels":["a",["b"]]}', CHANNELS),
            (b'{"channels":[0]}', f"an integer channel lies between 1 and {MAX_ID}"),
            (b'{"channels":[-5]}', f"an integer channel lies between 1 and {MAX_ID}"),
            (b'{"channels":[9007199254740992]}', f"an integer channel lies between 1 and {MAX_ID}"),
            (b'{"channels":["05"]}', f"a name of digits only is an integer channel, between 1 and {MAX_ID}"),
            (b'{"channels":["a",""]}', "a channel's name is not empty, '.' or '..'"),
        ],
    )
    def test_wrong_channels(self, body: bytes, sentence: str) -> None:
        """The error is about the member `channels`, whichever of them is wrong."""
        assert refusal(parse_poll_body, body, SETTINGS) == ("invalid_parameter", "channels", sentence)

    @pytest.mark.parametrize(
        ("body", "sentence"),
        [
            (b"", "the poll is not valid JSON: it is empty"),
            (b" \n", "the poll is not valid JSON: it is empty"),
            (b"{", "the poll is not valid JSON: it ends too soon"),
            (b'{"channels":["a"]', "the poll is not valid JSON: it ends too soon"),
            (b'{"channels":["\xff"]}', "the poll is not valid JSON: a string is not UTF-8"),
            (b'{"channels":["\\ud800"]}', f"the poll is not valid JSON: {SURROGATE}"),
            (b'{"channels":["\\udc00 and more text"]}', f"the poll is not valid JSON: {SURROGATE}"),
            (b'["a"]', "the poll is not a JSON object"),
            (b'"a"', "the poll is not a JSON object"),
            (b"null", "the poll is not a JSON object"),
            (b"7", "the poll is not a JSON object"),
            (b"[" * 100_000, "the poll is not a JSON object"),
        ],
    )
    def test_wrong_json(self, body: bytes, sentence: str) -> None:
        """The sentence says what is wrong with the body as a whole."""
        assert refusal(parse_poll_body, body, SETTINGS) == ("invalid_request", None, sentence)

    @pytest.mark.parametrize(
        "body", [b'{"channels":["a"]} x', b"channel=a", b'\xef\xbb\xbf{"channels":["a"]}', b'{"channels":["a"],}']
    )
    def test_malformed_json(self, body: bytes) -> None:
        """Where there is a certain byte to blame, the sentence says which."""
        code, parameter, sentence = refusal(parse_poll_body, body, SETTINGS)

        assert (code, parameter) == ("invalid_request", None)
        assert re.fullmatch(r"the poll is not valid JSON: .+ \(byte [0-9]+\)", sentence)

    @given(st.binary())
    @settings(derandomize=True, deadline=None)
    def test_never_anything_but_a_poll_or_an_error(self, body: bytes) -> None:
        """No bytes whatever make it fail otherwise."""
        with pytest.raises(InvalidRequest):
            parse_poll_body(body, SETTINGS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=20,
)


class TestPublication:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            (b'{"channels":["a"],"data":1}', Publication(("a",), b"1")),
            (b'{"channels":["b",17,"a"],"data":null}', Publication(("b", "17", "a"), b"null")),
            (b'{"channels":["a","a"],"data":[]}', Publication(("a",), b"[]")),
            (b'{"channels":["a"],"data":{},"key":"k"}', Publication(("a",), b"{}", "k")),
            (b'{"key":" ","data":"","channels":["a"]}', Publication(("a",), b'""', " ")),
        ],
    )
    def test_taken(self, body: bytes, expected: Publication) -> None:
        """Channels once each in the order given; `data` is any JSON value; `key` is optional."""
        assert parse_publication(body, SETTINGS) == expected

    @pytest.mark.parametrize(
        "data",
        [
            b"0.10",
            b"-0",
            b"1E5",
            b"1.7976931348623157e308",
            b"5e-324",
            b"1e-999",
            b"123456789012345678901234567890",
            b'{"b" : 1,"a":2, "b":3}',
            b'"\\u0041\\/\\ud83d\\ude00"',
            '"é\u2028\x7f😀"'.encode(),
            b'"\\u0000"',
            b"[ 1 ,\t2 ]",
            b"[" * 100 + b"]" * 100,
            b"[" + b"{}," * 1000 + b'"]]]]"]',
            b'["' + b"[{" * 1000 + b'\\"[\\\\"]',
        ],
    )
    def test_data_is_kept_byte_for_byte(self, data: bytes) -> None:
        """Blanks, escapes, the digits of numbers and members that come twice are the publisher's business."""
        assert parse_publication(publication(data), SETTINGS).data == data

    def test_line_breaks_in_data_become_blanks(self) -> None:
        """They can only be between values; without them a message is one line on every transport."""
        parsed = parse_publication(publication(b'{\r\n  "a": [1,\n2],\r"b": "\\n\\r"\n}'), SETTINGS)

        assert parsed.data == b'{    "a": [1, 2], "b": "\\n\\r" }'

    def test_blanks_around_data_are_not_part_of_it(self) -> None:
        """A message is the value."""
        assert parse_publication(b'{"channels":["a"],"data": \n 5 \n }', SETTINGS).data == b"5"

    @pytest.mark.parametrize(
        ("data", "sentence"),
        [
            (b"1e999", "the data has a number that is too large"),
            (b"[-1e999]", "the data has a number that is too large"),
            (b'{"data":{"channels":1e999}}', "the data has a number that is too large"),
            (b"1" * 5000, "the data has a number that is too large"),
            (b'"\xff"', "the data is not valid JSON: a string is not UTF-8"),
            (b'{"a":["\xed\xa0\x80"]}', "the data is not valid JSON: a string is not UTF-8"),
        ],
    )
    def test_wrong_data(self, data: bytes, sentence: str) -> None:
        """What receivers could not read is refused before it is stored."""
        body = publication(data)

        assert refusal(parse_publication, body, SETTINGS) == ("invalid_parameter", "data", sentence)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b'"\\ud800"', SURROGATE),
            (b'"\\ud800!"', SURROGATE),
            (b'"\\ud800 and more text"', SURROGATE),
            (b'"\\ud800\\n and more text"', SURROGATE),
            (b'"\\ud800\\u0041"', SURROGATE),
            (b'"\\ud800\\ud800"', SURROGATE),
            (b'"\\uDC00"', SURROGATE),
            (b'"\\\\\\ud800"', SURROGATE),
            (b'{"\\ud800":1}', SURROGATE),
            (b'"\\\\ud800', "it ends too soon"),
            (b'"\\ud83d\\ude00', "it ends too soon"),
        ],
    )
    def test_half_surrogates(self, data: bytes, reason: str) -> None:
        """Text that has no bytes is refused in plain words, wherever in a string it stands."""
        sentence = f"the publication is not valid JSON: {reason}"

        assert refusal(parse_publication, publication(data), SETTINGS) == ("invalid_request", None, sentence)

    @pytest.mark.parametrize(
        "data",
        [
            b"NaN",
            b"Infinity",
            b"-Infinity",
            b"01",
            b"+1",
            b".5",
            b"1.",
            b"'a'",
            b'"a\nb"',
            b'"\x00"',
            b'"\\x"',
            b'"\\uZZZZ"',
            b"[1,]",
            b"[1",
            b"{1:2}",
            b"{} {}",
            b"// no\n1",
            b"",
        ],
    )
    def test_malformed_json(self, data: bytes) -> None:
        """What is not JSON is refused, and the sentence says where."""
        code, parameter, sentence = refusal(parse_publication, publication(data), SETTINGS)

        assert (code, parameter) == ("invalid_request", None)
        assert re.fullmatch(r"the publication is not valid JSON: .+ \(byte 2[0-9]\)", sentence)

    @pytest.mark.parametrize(
        "data",
        [
            b"[" * 101 + b"]" * 101,
            b'{"":' * 100 + b"{}" + b"}" * 100,
            b'[1,{"a":' * 51 + b"1" + b"}]" * 51,
            b"[[],{}," + b"[" * 100 + b"]" * 100 + b",[]]",
            b'["]]",' * 101 + b"1" + b"]" * 101,
        ],
    )
    def test_deep_nesting(self, data: bytes) -> None:
        """A hundred levels are enough for data, and more than some receivers can read."""
        body = publication(data)

        assert refusal(parse_publication, body, SETTINGS) == (
            "invalid_parameter",
            "data",
            "the data is nested more than 100 levels deep",
        )

    @pytest.mark.parametrize("opening", [b"[", b'{"a":'])
    def test_nesting_without_end(self, opening: bytes) -> None:
        """Nesting that would exhaust the stack is refused."""
        body = publication(opening * 100_000)

        assert refusal(parse_publication, body, SETTINGS) == (
            "invalid_request",
            None,
            "the publication is nested too deeply",
        )

    @pytest.mark.parametrize(
        ("body", "parameter", "sentence"),
        [
            (b'{"data":1}', "channels", f"channels is missing: it is {CHANNELS.removeprefix('channels is ')}"),
            (b'{"channels":["a"]}', "data", "data is missing: it is the message, any JSON value"),
            (b'{"channels":[],"data":1}', "channels", "a publication names at least one channel"),
            (b'{"channels":"a","data":1}', "channels", CHANNELS),
            (b'{"channels":[false],"data":1}', "channels", CHANNELS),
            (b'{"channels":["..",""],"data":1}', "channels", "a channel's name is not empty, '.' or '..'"),
            (b'{"channels":["a"],"data":1,"key":""}', "key", KEY),
            (b'{"channels":["a"],"data":1,"key":"' + b"k" * 256 + b'"}', "key", KEY),
            (b'{"channels":["a"],"data":1,"key":5}', "key", KEY),
            (b'{"channels":["a"],"data":1,"key":null}', "key", KEY),
            (b'{"channels":["a"],"data":1,"ttl":5}', "ttl", "'ttl' is not a parameter of a publication"),
            (b'{"channel":"a","data":1}', "channel", "'channel' is not a parameter of a publication"),
        ],
    )
    def test_wrong_members(self, body: bytes, parameter: str, sentence: str) -> None:
        """Missing, unknown and wrong members are named."""
        assert refusal(parse_publication, body, SETTINGS) == ("invalid_parameter", parameter, sentence)

    @pytest.mark.parametrize("key", ["k", "é" * 255, "😀" * 255, "\x00", "\u2028"])
    def test_keys_in_the_body(self, key: str) -> None:
        """Up to 255 characters of any kind."""
        body = json.dumps({"channels": ["a"], "data": 1, "key": key}).encode()

        assert parse_publication(body, SETTINGS).key == key

    @pytest.mark.parametrize(
        ("member", "header", "key"),
        [
            (b"", "k", "k"),
            (b',"key":"k"', "k", "k"),
            (b"", "a b", "a b"),
            (b"", '"quoted"', '"quoted"'),
            (b"", None, None),
        ],
    )
    def test_a_key_in_the_header(self, member: bytes, header: str | None, key: str | None) -> None:
        """The header is the key, as it is; a key in the body as well is the same one."""
        assert parse_publication(b'{"channels":["a"],"data":1%b}' % member, SETTINGS, header).key == key

    @pytest.mark.parametrize("header", ["", "k" * 256, "é", "a\tb", "\udcff", "a\x7f"])
    def test_wrong_headers(self, header: str) -> None:
        """A header is printable ASCII."""
        assert refusal(parse_publication, publication(b"1"), SETTINGS, header) == (
            "invalid_parameter",
            "Idempotency-Key",
            "the Idempotency-Key header is 1 to 255 printable ASCII characters",
        )

    def test_keys_that_differ(self) -> None:
        """Two different keys for one publication are a mistake."""
        body = b'{"channels":["a"],"data":1,"key":"a"}'

        assert refusal(parse_publication, body, SETTINGS, "b") == (
            "invalid_parameter",
            "key",
            "key and the Idempotency-Key header differ",
        )

    def test_too_much_data(self) -> None:
        """Data is measured as it was sent; just the limit is not too much."""
        limited = Settings(message_bytes_max=10)

        assert parse_publication(publication(b'"12345678"'), limited).data == b'"12345678"'
        with pytest.raises(TooLarge) as caught:
            parse_publication(publication(b'"123456789"'), limited)
        assert said(caught.value) == ("too_large", None, "data is 11 bytes of JSON; the limit is 10")

    @given(json_values)
    @example({"": [1e308, 5e-324, -0.0, 10**400, "\x7f\u2028"]})
    @settings(max_examples=300, derandomize=True, deadline=None)
    def test_any_json_value_comes_out_as_it_went_in(self, value: Any) -> None:
        """What is published, in whichever of the usual spellings of JSON, is delivered equal, in one line."""
        for spelling in (
            {"ensure_ascii": True},
            {"ensure_ascii": False, "separators": (",", ":")},
            {"indent": 2},
        ):
            try:
                data = json.dumps(value, **spelling).encode()
            except UnicodeEncodeError:
                continue  # A lone surrogate has no bytes.
            try:
                parsed = parse_publication(publication(data), Settings(message_bytes_max=10**6))
            except InvalidRequest:
                assert any(0xD800 <= ord(char) <= 0xDFFF for char in json.dumps(value, ensure_ascii=False))
                continue
            message = Message(7, parsed.channels, parsed.data)
            body = Answer([(message, message.json(("a",)))], 8, "message").body
            assert json.loads(body) == {
                "messages": [{"id": 7, "channels": ["a"], "data": json.loads(data)}],
                "next": 8,
                "gap": False,
            }
            assert b"\n" not in body


def _parsed(item: bytes, limited: Settings) -> Any:
    try:
        return parse_publication(item, limited)
    except PushUpError as error:
        return said(error)


_NAMES = st.sampled_from(
    [
        b'"a"',
        b'"b c"',
        b'""',
        b'"."',
        b'"12"',
        b'"007"',
        b"12",
        b"0",
        b"true",
        b'"\xc3\xa9"',
        b'"\\u0001"',
        b'"\xc2\xb2"',
    ]
    + [b'"%b"' % (b"n" * length) for length in (255, 256)]
)
_ITEMS = st.one_of(
    st.builds(
        lambda names, data, key: b'{"channels":[%b],"data":%b%b}' % (b",".join(names), data, key),
        st.one_of(st.just([b'"a"']), st.lists(_NAMES, max_size=3)),
        st.sampled_from(
            [b"1", b"1e999", b'"\xc3\xa9"', b'{"x":\n1}', b"[" * 101 + b"]" * 101, b"[" * 120 + b"]" * 120]
            + [b'"%b"' % (b"x" * length) for length in (297, 298, 299)]
        ),
        st.sampled_from([b"", b"", b',"key":"k"', b',"key":""', b',"key":1', b',"more":1']),
    ),
    st.sampled_from([b"1", b"[]", b'{"channels":["a"]}', b'{"data":1}']),
)


class TestPublications:
    def test_an_array_is_a_batch(self) -> None:
        """The first character that is not a blank decides."""
        assert is_batch(b"[]")
        assert is_batch(b" \t\r\n[")
        assert not is_batch(b'{"channels":[]}')
        assert not is_batch(b"")
        assert not is_batch(b"\xa0[]")

    def test_a_wrong_item_spoils_no_other(self) -> None:
        """Every item is parsed by itself; a wrong one is its error, in its place."""
        body = (
            b'[{"channels":["a"],"data":1}, 5, {"channels":["a"]}, {"channels":["a"],"data":1e999},\n'
            b'{"channels":["b"],"data":{"x":\n[]},"key":"k"}, [], {"channels":["a"],"data":"0123456789"}]'
        )

        items = parse_publications(body, Settings(message_bytes_max=11))

        assert [said(item) if isinstance(item, PushUpError) else item for item in items] == [
            Publication(("a",), b"1"),
            ("invalid_request", None, "the publication is not a JSON object"),
            ("invalid_parameter", "data", "data is missing: it is the message, any JSON value"),
            ("invalid_parameter", "data", "the data has a number that is too large"),
            Publication(("b",), b'{"x": []}', "k"),
            ("invalid_request", None, "the publication is not a JSON object"),
            ("too_large", None, "data is 12 bytes of JSON; the limit is 11"),
        ]

    @given(st.lists(_ITEMS, max_size=6), st.booleans())
    @settings(deadline=None)
    def test_an_item_is_taken_as_it_would_be_alone(self, items: list[bytes], pretty: bool) -> None:
        """Whatever is beside it."""
        limited = Settings(message_bytes_max=300, publish_channels_max=2)
        body = (b"[\n%b\n]" if pretty else b"[%b]") % b",".join(items)

        alone = [_parsed(item, limited) for item in items]

        taken = parse_publications(body, limited)
        assert [said(item) if isinstance(item, PushUpError) else item for item in taken] == alone

    def test_no_items(self) -> None:
        """An empty array publishes nothing."""
        assert parse_publications(b"[]", SETTINGS) == []

    @pytest.mark.parametrize(
        ("body", "sentence"),
        [
            (b"[", "the list of publications is not valid JSON: it ends too soon"),
            (b'["\\ud800"]', f"the list of publications is not valid JSON: {SURROGATE}"),
            (b"[" * 100_000, "the list of publications is nested too deeply"),
        ],
    )
    def test_an_array_that_is_not_json(self, body: bytes, sentence: str) -> None:
        """Where items end must be certain."""
        assert refusal(parse_publications, body, SETTINGS) == ("invalid_request", None, sentence)

    @pytest.mark.parametrize("body", [b"[1,]", b"[1] [2]", b"[1 2]", b"[NaN]"])
    def test_a_malformed_array(self, body: bytes) -> None:
        """The sentence says where."""
        code, parameter, sentence = refusal(parse_publications, body, SETTINGS)

        assert (code, parameter) == ("invalid_request", None)
        assert re.fullmatch(r"the list of publications is not valid JSON: .+ \(byte [0-9]\)", sentence)

    def test_too_many_items(self) -> None:
        """They are counted before they are parsed; just the limit is not too many."""
        limited = Settings(publish_batch_max=2)

        assert len(parse_publications(b"[1,2]", limited)) == 2
        with pytest.raises(TooLarge) as caught:
            parse_publications(b"[1,2,3]", limited)
        assert said(caught.value) == ("too_large", None, "the array has 3 publications; the limit is 2")


class TestChannelOptions:
    @pytest.mark.parametrize(
        ("body", "name", "options"),
        [
            (b"", None, ChannelOptions()),
            (b"{}", None, ChannelOptions()),
            (b'{"name":"a"}', "a", ChannelOptions()),
            (b'{"name":"\xd9\xa3"}', "٣", ChannelOptions()),
            (b'{"ttl":0.5,"window":0,"max_messages":1}', None, ChannelOptions(0.5, 0.0, 1)),
            (b'{"ttl":1000000000,"window":1e9}', None, ChannelOptions(1e9, 1e9)),
            (b'{"max_messages":9007199254740991}', None, ChannelOptions(max_messages=MAX_ID)),
        ],
    )
    def test_taken(self, body: bytes, name: str | None, options: ChannelOptions) -> None:
        """Everything is optional, the body as well."""
        assert parse_channel_options(body) == (name, options)

    @pytest.mark.parametrize(
        ("body", "parameter", "sentence"),
        [
            (b'{"name":null}', "name", NAME),
            (b'{"name":5}', "name", NAME),
            (b'{"name":""}', "name", "a channel's name is not empty, '.' or '..'"),
            (b'{"name":"5"}', "name", "a name of digits only is an integer channel, and those are handed out"),
            (b'{"name":"05"}', "name", f"a name of digits only is an integer channel, between 1 and {MAX_ID}"),
            (b'{"ttl":0}', "ttl", TTL),
            (b'{"ttl":-1}', "ttl", TTL),
            (b'{"ttl":1000000000.1}', "ttl", TTL),
            (b'{"ttl":1e999}', "ttl", TTL),
            (b'{"ttl":"5"}', "ttl", TTL),
            (b'{"ttl":true}', "ttl", TTL),
            (b'{"ttl":null}', "ttl", TTL),
            (b'{"window":-0.1}', "window", WINDOW),
            (b'{"window":2000000000}', "window", WINDOW),
            (b'{"window":null}', "window", WINDOW),
            (b'{"max_messages":0}', "max_messages", MAX_MESSAGES),
            (b'{"max_messages":1.5}', "max_messages", MAX_MESSAGES),
            (b'{"max_messages":9007199254740992}', "max_messages", MAX_MESSAGES),
            (b'{"max_messages":true}', "max_messages", MAX_MESSAGES),
            (b'{"max_messages":null}', "max_messages", MAX_MESSAGES),
            (b'{"channel":"a"}', "channel", "'channel' is not a parameter of a channel"),
        ],
    )
    def test_wrong_members(self, body: bytes, parameter: str, sentence: str) -> None:
        """Options have the bounds of the settings they replace; null is not the same as left out."""
        assert refusal(parse_channel_options, body) == ("invalid_parameter", parameter, sentence)

    @pytest.mark.parametrize(
        ("body", "sentence"),
        [
            (b" ", "the channel is not valid JSON: it is empty"),
            (b"[]", "the channel is not a JSON object"),
            (b'"a"', "the channel is not a JSON object"),
        ],
    )
    def test_wrong_bodies(self, body: bytes, sentence: str) -> None:
        """What is there is an object."""
        assert refusal(parse_channel_options, body) == ("invalid_request", None, sentence)


class TestRenewal:
    @pytest.mark.parametrize(
        ("body", "ttl"), [(b"", None), (b"{}", None), (b'{"ttl":60}', 60.0), (b'{"ttl":0.001}', 0.001)]
    )
    def test_taken(self, body: bytes, ttl: float | None) -> None:
        """Without a ttl the channel keeps its own."""
        assert parse_renewal(body) == ttl

    @pytest.mark.parametrize(
        ("body", "parameter", "sentence"),
        [
            (b'{"ttl":0}', "ttl", TTL),
            (b'{"ttl":null}', "ttl", TTL),
            (b'{"window":5}', "window", "'window' is not a parameter of a renewal"),
        ],
    )
    def test_wrong_members(self, body: bytes, parameter: str, sentence: str) -> None:
        """Only the ttl can be renewed."""
        assert refusal(parse_renewal, body) == ("invalid_parameter", parameter, sentence)

    def test_a_body_that_is_no_object(self) -> None:
        """A bare number is not a ttl."""
        assert refusal(parse_renewal, b"60") == ("invalid_request", None, "the renewal is not a JSON object")


class TestPage:
    @pytest.mark.parametrize(
        ("query", "page"),
        [
            ("", ("", 100)),
            ("after=b", ("b", 100)),
            ("after=", ("", 100)),
            ("limit=1&after=%C3%A9", ("é", 1)),
            ("after=a+b", ("a b", 100)),
            ("limit=1000", ("", 1000)),
        ],
    )
    def test_taken(self, query: str, page: tuple[str, int]) -> None:
        """The first hundred, unless told otherwise."""
        assert parse_page(query) == page

    @pytest.mark.parametrize("value", ["", "0", "-1", "01", "1001", "10000", "1.0", "1e2", "ten", "٣", " 5"])
    def test_wrong_limits(self, value: str) -> None:
        """A limit is a whole number with an end."""
        assert refusal(parse_page, f"limit={value}") == (
            "invalid_parameter",
            "limit",
            "limit is an integer between 1 and 1000",
        )

    @pytest.mark.parametrize(
        ("query", "parameter", "sentence"),
        [
            ("before=a", "before", "'before' is not a parameter of a listing"),
            ("after=a&after=a", "after", "after is given more than once"),
            ("limit=1&limit=2", "limit", "limit is given more than once"),
        ],
    )
    def test_wrong_parameters(self, query: str, parameter: str, sentence: str) -> None:
        """Each once, and no others."""
        assert refusal(parse_page, query) == ("invalid_parameter", parameter, sentence)


class TestSegments:
    """A channel's name in a path."""

    @pytest.mark.parametrize(
        ("segment", "name"), [("news", "news"), ("a%2Fb", "a/b"), ("a+b", "a+b"), ("%7Bx%7D", "{x}"), ("17", "17")]
    )
    def test_taken(self, segment: str, name: str) -> None:
        """Percent-decoded as UTF-8; a plus is a plus."""
        assert parse_segment(segment) == name

    @pytest.mark.parametrize(
        ("segment", "sentence"),
        [
            ("%zz", "%zz in the path is not a percent-encoded byte"),
            ("%", "% in the path is not a percent-encoded byte"),
            ("%ff", "the path is not UTF-8 when percent-decoded"),
        ],
    )
    def test_wrong(self, segment: str, sentence: str) -> None:
        """What cannot be decoded names no channel, not even one that is called so."""
        with pytest.raises(InvalidRequest, match=sentence):
            parse_segment(segment)


def info(channel: str) -> ChannelInfo:
    return ChannelInfo(channel, 1, 2, 3.0, 4.0, 5, 0, None, None)


class TestShow:
    def test_receipts(self) -> None:
        """An id; the word that it is an earlier publication's only where it is; an error is the problem document."""
        assert show_receipt(Receipt(7)) == {"id": 7}
        assert show_receipt(Receipt(7, duplicate=True)) == {"id": 7, "duplicate": True}
        assert show_receipt(ChannelNotFound(17)) == {"error": ChannelNotFound(17).problem()}
        assert show_receipt(InvalidParameter("key", "no")) == {"error": InvalidParameter("key", "no").problem()}

    def test_a_channels_facts(self) -> None:
        """All facts; an integer channel is a number."""
        assert show_info(info("a")) == {
            "channel": "a",
            "created": 1,
            "expires": 2,
            "ttl": 3.0,
            "window": 4.0,
            "max_messages": 5,
            "messages": 0,
            "first": None,
            "last": None,
        }
        assert show_info(info("17"))["channel"] == 17

    def test_pages(self) -> None:
        """One more channel than wanted says that there is a next page, which begins after the last one shown."""
        page = [info("1"), info("2"), info("c")]

        assert [shown["channel"] for shown in show_page(page, 2)["channels"]] == [1, 2]
        assert show_page(page, 2)["next"] == "2"
        assert show_page(page, 3)["next"] is None
        assert show_page([], 3) == {"channels": [], "next": None}


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        [1.5, "é😀\u2028\x7f", {"": [], "a\nb": {}}],
        123456789012345678901234567890,
        '\x00\x1f\\"/',
    ],
)
async def test_a_published_value_is_delivered_equal(value: Any) -> None:
    """From one client's JSON to another's, through a whole server."""
    async with running() as server, connected(server) as client:
        id = await client.publish("a", "b", data=value)

        reply = await client.get("/poll?channel=b&channel=a")

        assert reply.json == {
            "messages": [{"id": id, "channels": ["b", "a"], "data": value}],
            "next": id + 1,
            "gap": False,
        }


# Streams


STREAM = "channel=a&channel=b&start=7"


@pytest.mark.parametrize(
    ("query", "last", "expected"),
    [
        ("channel=a", None, (("a",), 0)),
        ("channel=a", "", (("a",), 0)),
        ("channel=a&start=latest", None, (("a",), LATEST)),
        ("channel=a&start=latest", "5", (("a",), 5)),
        ("channel=a&start=9", "5", (("a",), 5)),
        ("channel=b&channel=a&channel=b&token=x&", "0", (("b", "a"), 0)),
        (STREAM, str(MAX_ID), (("a", "b"), MAX_ID)),
    ],
)
def test_stream_query(query: str, last: str | None, expected: tuple[tuple[str, ...], int]) -> None:
    """Channels and a cursor; the last event id, if there is one, is the later cursor."""
    poll = parse_stream_query(query, last, SETTINGS)
    assert (poll.channels, poll.start, poll.end) == (*expected, MAX_ID)


@pytest.mark.parametrize(
    ("query", "last", "parameter"),
    [
        ("", None, "channel"),
        ("start=1", "1", "channel"),
        ("channel=a&end=1", None, "end"),
        ("channel=a&timeout=1", None, "timeout"),
        ("channel=a&%65nd=1", None, "end"),
        ("channel=a&chanel=b", None, "chanel"),
        ("channel=a&start=x", "1", "start"),
        ("channel=a", "x", "Last-Event-ID"),
        ("channel=a", "latest", "Last-Event-ID"),
        ("channel=a", "-1", "Last-Event-ID"),
        ("channel=a", "01", "Last-Event-ID"),
        ("channel=a", "1 ", "Last-Event-ID"),
        ("channel=a", str(MAX_ID + 1), "Last-Event-ID"),
        ("channel=a", "٣", "Last-Event-ID"),
    ],
)
def test_wrong_stream_query(query: str, last: str | None, parameter: str) -> None:
    """What has no meaning on a stream is an error that names it."""
    with pytest.raises(InvalidParameter) as caught:
        parse_stream_query(query, last, SETTINGS)
    assert caught.value.members["parameter"] == parameter
    assert parameter in caught.value.detail or parameter == "channel"


@pytest.mark.parametrize(
    ("query", "token"),
    [("", None), ("&&", None), ("token=a.b-c", "a.b-c"), ("&token=%41", "A"), ("token", None), ("token=", "")],
)
def test_token_query(query: str, token: str | None) -> None:
    """A token, or nothing."""
    assert parse_token_query(query) == token


@pytest.mark.parametrize("query", ["channel=a", "token=a&x", "token=a&token=a", "tok%65n=a&token=b", "=", "token=%"])
def test_wrong_token_query(query: str) -> None:
    """Anything else, and anything twice."""
    with pytest.raises(InvalidRequest):
        parse_token_query(query)


def test_frames() -> None:
    """One of three, with or without a ref."""
    assert parse_frame(b'{"subscribe":["b",17,"b"]}', SETTINGS) == Frame(("b", "17"), (), None, 0, {})
    assert parse_frame(b'{"start":"latest","subscribe":["a"]}', SETTINGS).start == LATEST
    assert parse_frame(b'{"subscribe":["a"],"start":5}', SETTINGS).start == 5
    assert parse_frame(b' {"unsubscribe":["a",17]}\n', SETTINGS) == Frame((), ("a", "17"), None, 0, {})
    frame = parse_frame(b'{"publish":{"channels":["a"],"data":[1,\n2],"key":"k"},"ref":[ 1 ]}', SETTINGS)
    assert frame.publication == Publication(("a",), b"[1, 2]", "k")
    assert msgspec.json.encode(frame.ref) == b'{"ref":[ 1 ]}'
    assert frame.error is None


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("{}", "a frame is one of subscribe, unsubscribe and publish"),
        ('{"subscribe":["a"],"unsubscribe":["a"]}', "a frame is one of subscribe, unsubscribe and publish"),
        ('{"subscribe":["a"],"publish":{"channels":["a"],"data":1}}', "a frame is one of subscribe, unsubscribe and "),
        ('{"subscribe":"a"}', "subscribe is an array of channels"),
        ('{"subscribe":null}', "subscribe is an array of channels"),
        ('{"unsubscribe":{}}', "unsubscribe is an array of channels"),
        ('{"subscribe":[]}', "a poll names at least one channel"),
        ('{"subscribe":[1.5]}', "subscribe is an array of channels"),
        ('{"subscribe":[0]}', "an integer channel lies between 1 and"),
        ('{"subscribe":["."]}', "a channel's name is not empty"),
        ('{"subscribe":["a"],"start":null}', "start is an id between 0 and"),
        ('{"subscribe":["a"],"start":"5"}', "start is an id between 0 and"),
        ('{"subscribe":["a"],"start":1e15}', "start is an id between 0 and"),
        ('{"subscribe":["a"],"start":-1}', "start is an id between 0 and"),
        ('{"unsubscribe":["a"],"start":1}', "start belongs to subscribe, not to unsubscribe"),
        ('{"publish":{"channels":["a"],"data":1},"start":1}', "start belongs to subscribe, not to publish"),
        ('{"publish":1}', "the publication is not a JSON object"),
        ('{"publish":{"channels":["a"]}}', "data is missing"),
        ('{"publish":{"channels":["a"],"data":1,"x":1}}', "'x' is not a parameter of a publication"),
        ('{"publish":{"channels":["a"],"data":1},"key":"k"}', "'key' is not a parameter of a frame"),
        (r'{"publish":{"channels":["a"],"data":"\ud800"}}', "one half of a surrogate pair"),
        (r'{"subscribe":["\udc00"]}', "one half of a surrogate pair"),
    ],
)
def test_a_wrong_frame_keeps_its_ref(text: str, detail: str) -> None:
    """What is wrong is in the frame, so that it can be told with the ref, wherever that is."""
    for more in ('"ref":{"n": 1}}', '"ref":{"n": 1} }'):
        comma = "" if text == "{}" else ","
        frame = parse_frame((text[:-1] + comma + more).encode(), SETTINGS)
        assert frame.error is not None
        assert detail in frame.error.detail
        assert json.loads(msgspec.json.encode(frame.ref)) == {"ref": {"n": 1}}
        assert (frame.subscribe, frame.unsubscribe, frame.publication) == ((), (), None)
    assert parse_frame(text.encode(), SETTINGS).ref == {}


def test_a_ref_that_cannot_come_back() -> None:
    """Half a surrogate pair is no JSON that anybody could be sent."""
    frame = parse_frame(rb'{"subscribe":["a"],"ref":"\ud800"}', SETTINGS)
    assert frame.error is not None
    assert frame.ref == {}


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "x", "[]", "1", "null", '"a"', "{", "{} {}", "\ufeff{}", '{"ref":NaN}', '{"ref":1,}', "{'ref':1}"),
        *('{"ref":' + "[" * 100_000, "[" * 100_000, '{"ref":"\x00"}'),
    ],
    ids=lambda text: text[:10] or "empty",
)
def test_what_is_no_frame_at_all(text: str) -> None:
    """Nobody can say whom to tell."""
    with pytest.raises(InvalidRequest):
        parse_frame(text.encode(), SETTINGS)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ud8aefrsubcib01', max_size=60).map(str.encode))
def test_any_bytes_are_a_frame_or_refused(text: bytes) -> None:
    """No other error ever."""
    try:
        frame = parse_frame(text, SETTINGS)
    except InvalidRequest:
        return
    assert frame.error is not None or frame.subscribe or frame.unsubscribe or frame.publication
    msgspec.json.encode(frame.ref)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    )
)
def test_any_value_is_a_ref(value: Any) -> None:
    """It comes back as the same value, from right frames and wrong ones."""
    bodies: list[dict[str, Any]] = [{"subscribe": ["a"]}, {"subscribe": []}, {"x": 1}]
    for body in bodies:
        frame = parse_frame(json.dumps({**body, "ref": value}).encode(), SETTINGS)
        assert json.loads(msgspec.json.encode(frame.ref)) == {"ref": value}
