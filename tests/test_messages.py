"""The words of the domain: names of channels, messages, answers, and the bytes they are shown as."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pushup.errors import InvalidParameter
from pushup.messages import (
    MAX_ID,
    Answer,
    Message,
    Poll,
    Publication,
    are_plain,
    is_integer,
    parse_channel,
    show_channel,
)

INTEGER = f"an integer channel lies between 1 and {MAX_ID}"
DIGITS = f"a name of digits only is an integer channel, between 1 and {MAX_ID}"
EMPTY = "a channel's name is not empty, '.' or '..'"
LONG = "a channel's name is at most 255 bytes long in UTF-8"
CONTROL = "a channel's name has no control characters"
SURROGATE = "a channel's name is valid Unicode, without lone surrogates"


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "News",
        "chat:room-7",
        "board/42",
        "/",
        "{a}",
        "a b",
        " ",
        "...",
        ".a",
        "a.",
        "%2F",
        "a+b&c=d?e#f",
        "*",
        '"',
        "\\",
        "é",
        "e\u0301",
        "日本語",
        "😀",
        "\u2028",
        "\u200b",
        "\ufeff",
        "\uffff",
        "1a",
        "-1",
        "+1",
        "1.0",
        "1e3",
        "0x10",
        "1_000",
        "٣",
        "３",
        "²",
        "x" * 255,
        "é" * 127,
        "😀" * 63,
        "a" + "é" * 127,
    ],
)
def test_names(name: str) -> None:
    """A name is kept as it is: nothing in it is special, normalized or compared otherwise than by its characters."""
    assert parse_channel(name) == name
    assert not is_integer(name)
    assert show_channel(name) == name


@pytest.mark.parametrize(
    ("given", "name", "shown"),
    [
        (1, "1", 1),
        ("1", "1", 1),
        (MAX_ID, str(MAX_ID), MAX_ID),
        (str(MAX_ID), str(MAX_ID), MAX_ID),
        (1767225600000000, "1767225600000000", 1767225600000000),
    ],
)
def test_integer_channels(given: str | int, name: str, shown: int) -> None:
    """Digits and the number are the same channel, shown as a number."""
    assert parse_channel(given) == name
    assert is_integer(name)
    assert show_channel(name) == shown


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (0, INTEGER),
        (-1, INTEGER),
        (MAX_ID + 1, INTEGER),
        (10**400, INTEGER),
        (True, INTEGER),
        (False, INTEGER),
        ("0", DIGITS),
        ("01", DIGITS),
        ("007", DIGITS),
        (str(MAX_ID + 1), DIGITS),
        ("9" * 17, DIGITS),
        ("1" * 5000, DIGITS),
        ("", EMPTY),
        (".", EMPTY),
        ("..", EMPTY),
        ("x" * 256, LONG),
        ("é" * 128, LONG),
        ("😀" * 64, LONG),
        ("x" * 100_000, LONG),
        ("\x00", CONTROL),
        ("a\nb", CONTROL),
        ("a\n", CONTROL),
        ("5\n", CONTROL),
        ("\x1f", CONTROL),
        ("\x7f", CONTROL),
        ("\x80", CONTROL),
        ("\x9f", CONTROL),
        ("\ud800", SURROGATE),
        ("a\udcff", SURROGATE),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_can_never_name_a_channel(given: str | int, sentence: str) -> None:
    """Each is refused with the one rule it breaks."""
    with pytest.raises(InvalidParameter) as caught:
        parse_channel(given)

    assert caught.value.status == 400
    assert caught.value.code == "invalid_parameter"
    assert caught.value.members == {"parameter": "channel"}
    assert caught.value.detail == sentence


@given(st.text() | st.integers())
@settings(derandomize=True, deadline=None)
def test_a_parsed_name_is_parsed(given: str | int) -> None:
    """What is taken is a fixed point, survives UTF-8, and what is shown of it names the same channel."""
    try:
        name = parse_channel(given)
    except InvalidParameter:
        return

    assert parse_channel(name) == name
    assert name.encode().decode() == name
    assert parse_channel(show_channel(name)) == name


def test_a_message_as_json() -> None:
    """Exactly these bytes: id, channels, and the data as it was published."""
    message = Message(7, ("news",), b'{"b":1.50, "a":"\xc3\xa9"}')

    assert message.json(("news",)) == b'{"id":7,"channels":["news"],"data":{"b":1.50, "a":"\xc3\xa9"}}'


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("17", b"17"),
        ("é/{😀}", '"é/{😀}"'.encode()),
        ('"\\', b'"\\"\\\\"'),
        ("\u2028", b'"\xe2\x80\xa8"'),
        ("</script>", b'"</script>"'),
    ],
)
def test_channels_in_a_message(name: str, shown: bytes) -> None:
    """Integer channels are numbers, names are JSON strings."""
    assert Message(7, (name,), b"1").json((name,)) == b'{"id":7,"channels":[%b],"data":1}' % shown


@pytest.mark.parametrize(
    ("polled", "shown"),
    [
        (("a",), b'["a"]'),
        (("17",), b"[17]"),
        (("c", "b", "a"), b'["b","a"]'),
        (("a", "17", "b"), b'["a",17,"b"]'),
    ],
)
def test_a_message_of_several_channels(polled: tuple[str, ...], shown: bytes) -> None:
    """A poll sees those of the message's channels that it asked for, in its own order."""
    assert Message(7, ("a", "b", "17"), b"1").json(polled) == b'{"id":7,"channels":%b,"data":1}' % shown


def test_data_stays_what_it_was() -> None:
    """Also when a message is kept as JSON; so does its size."""
    for channels in (("a",), ('"é' * 50, "b")[:1], ("a", "b")):
        message = Message(7, channels, b"{}")

        assert (message.data, message.size) == (b"{}", 2)
        message.json(channels)
        assert (message.data, message.size) == (b"{}", 2)


def test_a_message_of_one_channel_is_encoded_once() -> None:
    """However many polls are told of it, whatever else they wait for."""
    message = Message(7, ("a",), b"1")

    assert message.json(("a",)) is message.json(("b", "a"))


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (Answer((), 5, "timeout"), b'{"messages":[],"next":5,"gap":false}'),
        (Answer((), MAX_ID, "gap", gap=True), b'{"messages":[],"next":9007199254740991,"gap":true}'),
        (Answer((), 5, "closed", closed="a"), b'{"messages":[],"next":5,"gap":false,"closed":["a"]}'),
        (Answer((), 5, "closed", closed="17"), b'{"messages":[],"next":5,"gap":false,"closed":[17]}'),
        (Answer((), 5, "drain"), b'{"messages":[],"next":5,"gap":false}'),
    ],
)
def test_answers_without_messages(answer: Answer, body: bytes) -> None:
    """Exactly these bytes; `closed` is there only where a channel was."""
    assert answer.body == body


def test_answers_with_messages() -> None:
    """The messages' own bytes, joined; encoded once."""
    first, second = Message(7, ("a",), b"1"), Message(9, ("b",), b'"x"')
    answer = Answer([(message, message.json(("a", "b"))) for message in (first, second)], 10, "message", gap=True)

    assert answer.body == (
        b'{"messages":[{"id":7,"channels":["a"],"data":1},{"id":9,"channels":["b"],"data":"x"}],"next":10,"gap":true}'
    )
    assert answer.body is answer.body


@given(
    st.lists(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**53), 2**53)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda values: st.lists(values, max_size=3) | st.dictionaries(st.just("k"), values),
        ),
        max_size=4,
    )
)
@settings(derandomize=True, deadline=None)
def test_an_answer_is_json(values: list[Any]) -> None:
    """Whatever was published, an answer reads back as what it says."""
    messages = [Message(number, ("a",), json.dumps(value).encode()) for number, value in enumerate(values)]

    body = Answer([(message, message.json(("a",))) for message in messages], 9, "message").body

    assert json.loads(body) == {
        "messages": [{"id": number, "channels": ["a"], "data": value} for number, value in enumerate(values)],
        "next": 9,
        "gap": False,
    }


@pytest.mark.parametrize(
    "other",
    [
        Publication(("a",), b"2"),
        Publication(("b",), b"1"),
        Publication(("a", "b"), b"1"),
        Publication(("a1",), b""),
        Publication(("a", "1"), b""),
    ],
)
def test_digests_tell_publications_apart(other: Publication) -> None:
    """Other channels or other data are another publication, wherever one ends and the other begins."""
    publication = Publication(("a",), b"1")

    assert publication.digest() != other.digest()
    assert len(other.digest()) == 16


def test_a_digest_does_not_depend_on_the_key() -> None:
    """The key is what a digest is stored under."""
    assert Publication(("a",), b"1", "k").digest() == Publication(("a",), b"1").digest()


def test_polls_are_equal_by_value() -> None:
    """So that tests can compare them."""
    assert Poll(("a",), 0, 5, 1.0) == Poll(("a",), 0, 5, 1.0)
    assert Poll(("a",), 0, 5, 1.0) != Poll(("a",), 0, 6, 1.0)
    assert Poll(("a",), 0, 5, 1.0) != ("a", 0, 5, 1.0)


def test_reprs_say_what_is_inside() -> None:
    """A failing test or a log shows the values."""
    assert repr(Poll(("a",), 0, 5, 1.0)) == "Poll(('a',), 0, 5, 1.0)"
    assert repr(Message(7, ("a",), b"1")) == "Message(7, ('a',), b'1')"


@given(st.lists(st.one_of(st.text(max_size=3), st.sampled_from(["", ".", "..", "12", "n" * 255, "n" * 256, 12]))))
def test_plain_names_are_channels_as_they_are(names: list[Any]) -> None:
    """What the look at all of them lets pass, the look at each does not touch."""
    if are_plain(names):
        assert [parse_channel(name) for name in names] == names
    elif all(isinstance(name, str) and name.isalpha() and name.isascii() and len(name) <= 255 for name in names):
        pytest.fail("these are plain")
