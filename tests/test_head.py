"""Which way a request goes, decided from its head alone."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pushup.head import HEADERS_MAX, Way, is_malformed, parse_head

HOST = b"Host: test\r\n"


def head(line: bytes, *headers: bytes, host: bytes = HOST) -> bytes:
    return line + b"\r\n" + host + b"".join(header + b"\r\n" for header in headers) + b"\r\n"


GET = b"GET /poll?channel=a HTTP/1.1"
POST = b"POST /poll HTTP/1.1"
PUBLISH = b"POST /publish HTTP/1.1"
PUT = b"PUT /publish HTTP/1.1"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(head(GET), id="GET"),
        pytest.param(head(b"HEAD /poll?channel=a HTTP/1.1"), id="HEAD"),
        pytest.param(head(POST, b"Content-Length: 20"), id="POST"),
        pytest.param(head(POST), id="POST that has no body yet lacks no head"),
        pytest.param(head(b"POST /poll?channel=a HTTP/1.1", b"Content-Length: 2"), id="POST with a query"),
        pytest.param(head(b"GET /poll HTTP/1.1"), id="no query"),
        pytest.param(head(b"GET /poll? HTTP/1.1"), id="an empty query"),
        pytest.param(head(b"GET /poll?/? HTTP/1.1"), id="a query of path characters"),
        pytest.param(head(b"GET  /poll?channel=a  HTTP/1.1"), id="two spaces"),
        pytest.param(head(GET, b"Content-Length: 0"), id="a body of no bytes"),
        pytest.param(head(GET, host=b"host: test\r\n"), id="host in lower case"),
        pytest.param(head(GET, host=b"Host:\r\n"), id="an empty host"),
        pytest.param(head(b"GET /poll?channel=a HTTP/1.0", host=b""), id="HTTP/1.0 without a host"),
        pytest.param(head(GET, b"Accept: */*", b"Accept: text/html"), id="a repeatable header twice"),
        pytest.param(head(GET, b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings"), id="the offer of HTTP/2"),
        pytest.param(head(GET, b"Upgrade: h2c"), id="an offer without Connection"),
        pytest.param(head(GET, b"X: \xff\xe9"), id="a header that is not ASCII"),
        pytest.param(head(GET, b"X:"), id="an empty header"),
        pytest.param(head(GET, b"X: a\t b \t"), id="white space around a value"),
        pytest.param(head(GET, *[b"X-%d: y" % n for n in range(HEADERS_MAX - 1)]), id="as many headers as may be"),
    ],
)
def test_a_plain_poll_takes_the_lane(data: bytes) -> None:
    """GET, HEAD and POST of /poll are polls, whatever harmless things they carry."""
    assert parse_head(data).way is Way.POLL


@pytest.mark.parametrize(
    ("data", "realm", "length"),
    [
        pytest.param(head(PUBLISH, b"Content-Length: 10"), "", 10, id="the root's"),
        pytest.param(head(b"POST /realms/a.b/publish HTTP/1.1", b"Content-Length: 10"), "a.b", 10, id="a realm's"),
        pytest.param(head(PUBLISH), "", 0, id="nothing in it"),
        pytest.param(head(PUBLISH, b"Idempotency-Key: k", b"Content-Length: 3"), "", 3, id="with a key"),
        pytest.param(head(b"POST /publish HTTP/1.0", b"Content-Length: 3", host=b""), "", 3, id="HTTP/1.0"),
        pytest.param(head(PUBLISH, b"Upgrade: h2c", b"Connection: Upgrade"), "", 0, id="the offer of HTTP/2"),
    ],
)
def test_a_plain_publication_takes_the_lane(data: bytes, realm: str, length: int) -> None:
    """POST of /publish is a publication."""
    found = parse_head(data)

    assert (found.way, found.realm, found.length, found.query) == (Way.PUBLISH, realm, length, "")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(head(b"POST /channels HTTP/1.1", b"Content-Length: 10"), id="another path"),
        pytest.param(head(b"GET /publish HTTP/1.1"), id="GET of a publication"),
        pytest.param(head(b"HEAD /publish HTTP/1.1"), id="HEAD of a publication"),
        pytest.param(head(b"PUT /publish HTTP/1.1", b"Content-Length: 2"), id="PUT of a publication"),
        pytest.param(head(b"POST /publish? HTTP/1.1", b"Content-Length: 2"), id="a publication with a query"),
        pytest.param(head(b"POST /publish/ HTTP/1.1", b"Content-Length: 2"), id="/publish/"),
        pytest.param(head(b"POST /publish#x HTTP/1.1", b"Content-Length: 2"), id="a publication with a fragment"),
        pytest.param(head(b"POST /realms//publish HTTP/1.1"), id="a publication of a realm without a name"),
        pytest.param(head(PUBLISH, b"Content-Length: 5", b"Expect: 100-continue"), id="Expect of a publication"),
        pytest.param(head(PUBLISH, b"Content-Length: 5", b"Content-Encoding: gzip"), id="an encoded publication"),
        pytest.param(head(b"GET /polls HTTP/1.1"), id="/polls"),
        pytest.param(head(b"GET /poll/ HTTP/1.1"), id="/poll/"),
        pytest.param(head(b"GET /poll/x?channel=a HTTP/1.1"), id="/poll/x"),
        pytest.param(head(b"GET /poll%20?channel=a HTTP/1.1"), id="/poll%20"),
        pytest.param(head(b"GET /%70oll?channel=a HTTP/1.1"), id="/%70oll"),
        pytest.param(head(b"GET //poll?channel=a HTTP/1.1"), id="//poll"),
        pytest.param(head(b"GET /./poll?channel=a HTTP/1.1"), id="/./poll"),
        pytest.param(head(b"GET /POLL?channel=a HTTP/1.1"), id="/POLL"),
        pytest.param(head(b"GET /poll;v=1?channel=a HTTP/1.1"), id="path parameters"),
        pytest.param(head(b"GET /poll#x HTTP/1.1"), id="a fragment"),
        pytest.param(head(b"GET /poll?channel=a#x HTTP/1.1"), id="a fragment after the query"),
        pytest.param(head(b"GET http://test/poll?channel=a HTTP/1.1"), id="absolute-form"),
        pytest.param(head(b"OPTIONS /poll HTTP/1.1"), id="OPTIONS"),
        pytest.param(head(b"OPTIONS * HTTP/1.1"), id="OPTIONS *"),
        pytest.param(head(b"PUT /poll HTTP/1.1", b"Content-Length: 2"), id="PUT"),
        pytest.param(head(b"DELETE /poll HTTP/1.1"), id="DELETE"),
        pytest.param(head(GET, b"Content-Length: 1"), id="GET with a body"),
        pytest.param(head(b"HEAD /poll?channel=a HTTP/1.1", b"Content-Length: 1"), id="HEAD with a body"),
        pytest.param(head(POST, b"Content-Length: 5", b"Expect: 100-continue"), id="Expect"),
        pytest.param(head(POST, b"Content-Length: 5", b"Content-Encoding: gzip"), id="Content-Encoding"),
        pytest.param(head(PUT, b"Content-Length: 2", b"Upgrade: h2c", b"Connection: Upgrade"), id="offers HTTP/2"),
    ],
)
def test_what_is_plain_but_nothing_for_the_lane_is_lent(data: bytes) -> None:
    """Whatever else has a length that is certain is lent to the web side."""
    assert parse_head(data).way is Way.LEND


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(head(POST, b"Transfer-Encoding: chunked"), id="chunked"),
        pytest.param(head(POST, b"Transfer-Encoding: gzip, chunked"), id="chunked at last"),
        pytest.param(head(GET, b"Transfer-Encoding: chunked"), id="chunked GET"),
        pytest.param(head(POST, b"Transfer-Encoding: identity"), id="a coding that is no framing"),
        pytest.param(head(POST, b"Transfer-Encoding: chunked, chunked"), id="chunked twice"),
        pytest.param(head(POST, b"Transfer-Encoding : chunked"), id="space before the colon of Transfer-Encoding"),
        pytest.param(head(POST, b"Transfer-Encoding:\x0bchunked"), id="vertical tab before chunked"),
        pytest.param(head(POST, b"Transfer-Encoding: x", b"Transfer-Encoding: chunked"), id="two transfer codings"),
        pytest.param(head(POST, b"Content-Length: 5", b"Transfer-Encoding: chunked"), id="CL and TE"),
        pytest.param(head(POST, b"Transfer-Encoding: chunked", b"Content-Length: 5"), id="TE and CL"),
        pytest.param(head(POST, b"Content-Length: 5", b"Content-Length: 5"), id="two equal lengths"),
        pytest.param(head(POST, b"Content-Length: 5", b"Content-Length: 6"), id="two lengths"),
        pytest.param(head(POST, b"Content-Length: 5, 5"), id="a list of lengths"),
        pytest.param(head(POST, b"Content-Length:"), id="an empty length"),
        pytest.param(head(POST, b"Content-Length: -1"), id="a negative length"),
        pytest.param(head(POST, b"Content-Length: +1"), id="a length with a plus"),
        pytest.param(head(POST, b"Content-Length: 0x10"), id="a length in hexadecimal"),
        pytest.param(head(POST, b"Content-Length: 1_0"), id="a length with an underscore"),
        pytest.param(head(POST, b"Content-Length: 1 0"), id="a length with a space inside"),
        pytest.param(head(POST, b"Content-Length: 1\x0b"), id="a length with a vertical tab"),
        pytest.param(head(POST, b"Content-Length: \xd9\xa5"), id="a length in Arabic digits"),
        pytest.param(head(POST, b"Content-Length: 18446744073709551616"), id="a length of 2**64"),
        pytest.param(head(POST, b"Content-Length : 5"), id="space before the colon of Content-Length"),
        pytest.param(head(GET, b"Upgrade: websocket", b"Connection: Upgrade"), id="WebSocket"),
        pytest.param(head(GET, b"Upgrade: h2c, WebSocket", b"Connection: Upgrade"), id="WebSocket among others"),
        pytest.param(head(GET, b"Upgrade: websocket", b"Upgrade: h2c"), id="WebSocket before others"),
        pytest.param(head(GET, b"Sec-WebSocket-Key1: x"), id="an old WebSocket"),
        pytest.param(head(b"CONNECT test:80 HTTP/1.1"), id="CONNECT"),
        pytest.param(head(GET, host=b""), id="no host"),
        pytest.param(head(GET, HOST[:-2]), id="two hosts"),
        pytest.param(head(GET, b"User-Agent: a", b"user-agent: b"), id="two user agents"),
        pytest.param(head(GET, b"Content-Type: a", b"Content-Type: a"), id="two content types"),
        pytest.param(head(GET, b"ETag: a", b"ETag: b"), id="two entity tags"),
        pytest.param(head(GET, b"Max-Forwards: 1", b"Max-Forwards: 1"), id="two max-forwards"),
        pytest.param(head(GET, b"X: a", b" b"), id="obs-fold"),
        pytest.param(head(GET, b"X: a", b"\tb"), id="obs-fold with a tab"),
        pytest.param(b"GET /poll HTTP/1.1\r\n Host: test\r\n\r\n", id="obs-fold of nothing"),
        pytest.param(head(GET, b"X: a\nb: c"), id="bare LF"),
        pytest.param(head(GET, b"X: a\rb: c"), id="bare CR"),
        pytest.param(head(GET, b"X: a\x00b"), id="NUL in a value"),
        pytest.param(head(GET, b"X\x00: a"), id="NUL in a name"),
        pytest.param(head(GET, b"X : a"), id="space before a colon"),
        pytest.param(head(GET, b": a"), id="no name"),
        pytest.param(head(GET, b"X"), id="no colon"),
        pytest.param(head(GET, b"X\xff: a"), id="a name that is not ASCII"),
        pytest.param(head(GET, *[b"X-%d: y" % n for n in range(HEADERS_MAX)]), id="too many headers"),
        pytest.param(head(b"GET /poll?channel=a HTTP/2.0"), id="HTTP/2.0 in words"),
        pytest.param(head(b"GET /poll?channel=a HTTP/1.2"), id="HTTP/1.2"),
        pytest.param(head(b"GET /poll?channel=a HTTP/1.10"), id="HTTP/1.10"),
        pytest.param(head(b"GET /poll?channel=a http/1.1"), id="http in lower case"),
        pytest.param(head(b"GET /poll?channel=a HTTP/1.1 "), id="space after the version"),
        pytest.param(b"GET /poll?channel=a\r\n\r\n", id="HTTP/0.9"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\n", id="the preface of HTTP/2"),
        pytest.param(head(b"get /poll?channel=a HTTP/1.1"), id="method in lower case"),
        pytest.param(head(b"POLL /poll?channel=a HTTP/1.1"), id="a method nobody knows"),
        pytest.param(head(b"GET /poll?channel=\xe9 HTTP/1.1"), id="target in Latin-1"),
        pytest.param(head("GET /poll?channel=é HTTP/1.1".encode()), id="target in UTF-8"),
        pytest.param(head(b"GET /poll?channel=\x00 HTTP/1.1"), id="NUL in the target"),
        pytest.param(head(b"GET /poll?channel=a b HTTP/1.1"), id="space in the target"),
        pytest.param(head(b"GET poll?channel=a HTTP/1.1"), id="no slash"),
        pytest.param(head(b"GET ?channel=a HTTP/1.1"), id="no path"),
        pytest.param(head(b"GET HTTP/1.1"), id="no target"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", id="TLS"),
        pytest.param(b"\r\n\r\n", id="blank lines"),
        pytest.param(b"", id="nothing"),
        pytest.param(head(GET)[:-2], id="an unfinished head"),
    ],
)
def test_what_is_not_certain_is_handed_over(data: bytes) -> None:
    """What is malformed, or framed by anything but one plain length, is the web side's for good."""
    assert parse_head(data).way is Way.HAND_OVER


@pytest.mark.parametrize(
    ("data", "keep_alive"),
    [
        (head(GET), True),
        (head(GET, b"Connection: keep-alive"), True),
        (head(GET, b"Connection: close"), False),
        (head(GET, b"Connection: CLOSE"), False),
        (head(GET, b"Connection: foo, close"), False),
        (head(GET, b"Connection: keep-alive", b"Connection: close"), False),
        (head(POST, b"Content-Length: 5", b"Connection: close"), False),
        (head(POST, b"Content-Length: 5"), True),
        (head(PUBLISH, b"Connection: close"), False),
        (head(b"GET /poll?channel=a HTTP/1.0"), False),
        (head(b"GET /poll?channel=a HTTP/1.0", b"Connection: keep-alive"), True),
        (head(b"GET /poll?channel=a HTTP/1.0", b"Connection: close"), False),
        (head(b"POST /poll HTTP/1.0", b"Content-Length: 5", b"Connection: keep-alive"), True),
        (head(GET, b"Upgrade: h2c", b"Connection: Upgrade"), True),
        (head(GET, b"Upgrade: h2c", b"Connection: Upgrade, close"), False),
    ],
)
def test_whether_the_connection_goes_on(data: bytes, keep_alive: bool) -> None:
    """HTTP/1.1 goes on unless told to close, HTTP/1.0 closes unless told to keep alive."""
    assert parse_head(data).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("data", "http10"),
    [(head(GET), False), (head(b"GET /poll HTTP/1.0"), True), (head(b"POST /publish HTTP/1.0"), True)],
)
def test_the_version_is_told(data: bytes, http10: bool) -> None:
    """Only HTTP/1.0 is HTTP/1.0."""
    assert parse_head(data).http10 is http10


@pytest.mark.parametrize(
    ("value", "length"),
    [
        (b"0", 0),
        (b"5", 5),
        (b"005", 5),
        (b"5 ", 5),
        (b"\t5\t", 5),
        (b"65537", 65537),
        (b"18446744073709551615", 2**64 - 1),
    ],
)
def test_the_length_is_that_of_the_body(value: bytes, length: int) -> None:
    """The length is what Content-Length says, with white space around it or zeros before it."""
    assert parse_head(head(PUBLISH, b"Content-Length: " + value)).length == length


def test_without_a_length_there_is_no_body() -> None:
    """A request without Content-Length ends with its head."""
    assert parse_head(head(PUBLISH)).length == 0


@pytest.mark.parametrize(
    ("target", "query"),
    [
        (b"/poll", ""),
        (b"/poll?", ""),
        (b"/poll?channel=a&channel=b", "channel=a&channel=b"),
        (b"/poll?channel=%E2%82%AC+%2b", "channel=%E2%82%AC+%2b"),
        (b"/poll?a?b/c", "a?b/c"),
    ],
)
def test_the_query_of_a_poll_is_left_as_it_came(target: bytes, query: str) -> None:
    """A poll has its raw query, not decoded yet."""
    assert parse_head(head(b"GET " + target + b" HTTP/1.1")).query == query


@pytest.mark.parametrize("data", [head(PUBLISH), head(GET, b"Content-Length: 1"), head(GET, host=b"")])
def test_what_is_no_poll_has_no_query(data: bytes) -> None:
    """Only a request that takes the lane has a query."""
    assert parse_head(data).query == ""


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01",
        b"\x00",
        b"G\x00",
        b"GETT",
        b"get ",
        b"GET /\xff",
        b"GET /poll\n\r\n",
        b"GET /poll HTTP/1.1\n",
        b"GET /poll HTTP/1.1\r\nHost: test\n",
        b"GET /poll HTTP/1.1\r\nHost : test",
        b"GET /poll HTTP/1.1\r\nX: \x00",
        b"GET /poll HTTP/3.1",
        b"POST /poll HTTP/1.1\r\nContent-Length: 1x",
        b"POST /poll HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\nX",
    ],
)
def test_a_wrong_beginning_is_seen_at_once(data: bytes) -> None:
    """What can never become a request need not be waited for."""
    assert is_malformed(data)


@pytest.mark.parametrize(
    "data",
    [
        head(b"GET /poll?channel=%41&timeout=0 HTTP/1.1", b"Accept: */*", b"Connection: close"),
        head(b"POST /publish HTTP/1.1", b"Content-Length: 12", b"Expect: 100-continue"),
        head(b"GET /ws HTTP/1.1", b"Upgrade: websocket", b"Connection: Upgrade"),
        head(b"CONNECT test:80 HTTP/1.1"),
        head(b"OPTIONS * HTTP/1.0", b"Transfer-Encoding: gzip, chunked"),
    ],
)
def test_no_prefix_of_a_valid_head_is_malformed(data: bytes) -> None:
    """A head may come one byte at a time."""
    assert [data[:end] for end in range(len(data)) if is_malformed(data[:end])] == []


_token = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=20).map(str.encode)
_value = st.text('abcXYZ019 \t"(),/:;<=>?@[]{}\\é€', max_size=30).map(str.encode)
_target = st.text("abcXYZ019/?&=%+.~-_!$'()*,;:@", max_size=30).map(lambda text: b"/" + text.encode())


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.sampled_from([b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"]),
    st.one_of(_target, _target.map(lambda rest: b"/poll?" + rest[1:])),
    st.lists(st.tuples(_token.map(lambda name: b"X-" + name), _value), max_size=5),
    st.data(),
)
def test_any_valid_head_is_understood(
    method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    """Every valid head is complete, is a poll exactly if it says so, and no prefix of it is malformed."""
    whole = head(b"%b %b HTTP/1.1" % (method, target), *[b"%b: %b" % header for header in headers])
    end = data.draw(st.integers(0, len(whole) - 1))

    parsed = parse_head(whole)

    is_poll = method in (b"GET", b"HEAD", b"POST") and (target == b"/poll" or target.startswith(b"/poll?"))
    assert parsed.way is (Way.POLL if is_poll else Way.LEND)
    assert (parsed.method, parsed.target) == (method, target)
    assert [name for name, _ in parsed.headers] == [b"host", *[name.lower() for name, _ in headers]]
    assert not is_malformed(whole[:end])


_PIECES = [
    *(b"GET", b"POST", b" ", b"/poll", b"?", b"#", b"\r\n", b"\r", b"\n", b"\x00", b"\xff", b"HTTP/1.", b"1", b"0"),
    *(b"Host", b"Content-Length", b"Transfer-Encoding", b"chunked", b":", b"Upgrade", b"Connection", b"close"),
]


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from(_PIECES),
            max_size=30,
        ).map(b"".join),
        st.binary(max_size=50).map(lambda junk: head(GET, b"X: " + junk)),
        st.binary(max_size=50).map(lambda junk: head(POST, b"Content-Length: " + junk)),
        st.binary(max_size=50).map(lambda junk: head(b"GET /poll" + junk)),
    )
)
@example(b"GET / HTTP/1.0\r\n!:\r\n!:\r\n\r\n\r")
@example(b"GET / HTTP/1.0\r\n\r\n\r\n\r\n")
def test_nothing_makes_it_raise(data: bytes) -> None:
    """Any bytes go some way; only complete requests of one head go any but the web side's."""
    parsed = parse_head(data)
    malformed = is_malformed(data[:-1])

    assert parsed.way is Way.HAND_OVER or (parsed.complete and not malformed and data.endswith(b"\r\n\r\n"))
    assert 0 <= parsed.length < 2**64


@pytest.mark.parametrize(
    ("target", "realm"),
    [
        (b"/poll?channel=a", ""),
        (b"/realms/shop/poll?channel=a", "shop"),
        (b"/realms/a.b-c_9/poll", "a.b-c_9"),
        (b"/realms/%s/poll" % (b"x" * 64), "x" * 64),
    ],
)
def test_the_realm_of_a_poll_is_in_its_path(target: bytes, realm: str) -> None:
    """A path without a realm is the root's."""
    parsed = parse_head(head(b"GET " + target + b" HTTP/1.1"))

    assert (parsed.way, parsed.realm) == (Way.POLL, realm)


@pytest.mark.parametrize(
    "target",
    [
        b"/realms//poll",
        b"/realms/a/b/poll",
        b"/realms/%61/poll",
        b"/realms/../poll",
        b"/realms/a/poll/",
        b"/realms/%s/poll" % (b"x" * 65),
        b"/realm/a/poll",
        b"//realms/a/poll",
        b"/realms/a/poll#x",
    ],
)
def test_an_odd_realm_is_the_web_sides(target: bytes) -> None:
    """The lane serves a realm only under the plain form of its name."""
    assert parse_head(head(b"GET " + target + b" HTTP/1.1")).way is Way.LEND


def test_a_head_of_too_many_fields_is_malformed_before_it_ends() -> None:
    """Nobody makes the lane read thousands of fields again and again while they come one by one."""
    fields = b"a:\r\n" * HEADERS_MAX

    assert not is_malformed(b"GET / HTTP/1.1\r\n" + fields)
    assert is_malformed(b"GET / HTTP/1.1\r\n" + fields + b"a:\r\n" * 3)
