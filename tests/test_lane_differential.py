"""The lane against aiohttp alone: the same bytes get the same answers, whichever of the two reads them.

Both sides are whole servers; a connection of the reference has no lane, so aiohttp's parser sees every byte. After each
case comes one more request: only if it is answered alike do the two agree on where the case ended.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from pushup.errors import ChannelNotFound
from pushup.lane import Lane
from pushup.server import Server
from tests import pipes
from tests.support import running

HOST = b"Host: test\r\n"
DATA = b'{"channels":["a"],"data":1}'
POLL_BODY = b'{"channels":["a"],"timeout":0}'


def get(target: bytes, *headers: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"%b %b HTTP/%b\r\n%b%b\r\n" % (method, target, version, HOST, lines)


def post(target: bytes, body: bytes, *headers: bytes, method: bytes = b"POST", version: bytes = b"1.1") -> bytes:
    return get(target, b"Content-Length: %d" % len(body), *headers, method=method, version=version) + body


def chunked(target: bytes, *chunks: bytes, end: bytes = b"0\r\n\r\n", headers: Sequence[bytes] = ()) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return get(target, b"Transfer-Encoding: chunked", *headers, method=b"POST") + body + end


POLL = get(b"/poll?channel=a&timeout=0")
PUBLISH = post(b"/publish", DATA)
HIDDEN = post(b"/publish", b'{"channels":["hidden"],"data":0}')
"""What no smuggler may get executed."""

AFTER = get(b"/after")

ORDINARY = {
    "poll": POLL,
    "poll by POST": post(b"/poll", POLL_BODY),
    "poll by HEAD": get(b"/poll?channel=a&timeout=0", method=b"HEAD"),
    "wrong poll by HEAD": get(b"/poll?channel=", method=b"HEAD"),
    "polls": POLL * 3,
    "poll, publish, poll": POLL + PUBLISH + POLL,
    "publish, publish": PUBLISH * 2,
    "publish a batch": post(b"/publish", b"[" + DATA + b',{"channels":[]}]'),
    "publish with a key twice": post(b"/publish", DATA, b"Idempotency-Key: k") * 2,
    "publish with a key of bytes": post(b"/publish", DATA, b"Idempotency-Key: \xff\xfe"),
    "create": post(b"/channels", b'{"name":"b"}') * 2,
    "describe": PUBLISH + get(b"/channels/a"),
    "describe by HEAD": PUBLISH + get(b"/channels/a", method=b"HEAD"),
    "describe nothing": get(b"/channels/nothing"),
    "list": PUBLISH + get(b"/channels?limit=1"),
    "close": PUBLISH + get(b"/channels/a", method=b"DELETE") + POLL,
    "renew": PUBLISH + post(b"/channels/a/renew", b""),
    "a parked poll": get(b"/poll?channel=nothing"),
    "a parked poll by HEAD": get(b"/poll?channel=nothing", method=b"HEAD"),
    "poll an integer channel": get(b"/poll?channel=1"),
    "404": get(b"/nothing"),
    "404 with a body": post(b"/nothing", DATA),
    "405": get(b"/publish"),
    "405 of a poll": get(b"/poll", method=b"DELETE"),
    "OPTIONS": get(b"/poll", method=b"OPTIONS"),
    "OPTIONS *": get(b"*", method=b"OPTIONS"),
    "CONNECT": get(b"test:80", method=b"CONNECT"),
    "TRACE": get(b"/poll", method=b"TRACE"),
    "PUT": post(b"/poll", POLL_BODY, method=b"PUT"),
    "413": post(b"/publish", b" " * 5000),
    "413 of a poll": post(b"/poll", b" " * 5000 + POLL_BODY),
    "a long poll by POST": post(b"/poll", b" " * 4000 + POLL_BODY),
    "Connection: close": get(b"/poll?channel=a&timeout=0", b"Connection: close"),
    "Connection: close in a list": get(b"/poll?channel=a&timeout=0", b"Connection: x, Close"),
    "Connection: close by POST": post(b"/poll", POLL_BODY, b"Connection: close"),
    "publish, Connection: close": post(b"/publish", DATA, b"Connection: close"),
    "wrong poll, Connection: close": get(b"/poll?channel=", b"Connection: close"),
    "HTTP/1.0": get(b"/poll?channel=a&timeout=0", version=b"1.0"),
    "HTTP/1.0 without a host": b"GET /poll?channel=a&timeout=0 HTTP/1.0\r\n\r\n",
    "HTTP/1.0 keep-alive": get(b"/poll?channel=a&timeout=0", b"Connection: keep-alive", version=b"1.0"),
    "HTTP/1.0 keep-alive by POST": post(b"/poll", POLL_BODY, b"Connection: keep-alive", version=b"1.0"),
    "HTTP/1.0 keep-alive, wrong": get(b"/poll?channel=", b"Connection: keep-alive", version=b"1.0"),
    "HTTP/1.0 publish": post(b"/publish", DATA, version=b"1.0"),
    "HTTP/1.0 publish keep-alive": post(b"/publish", DATA, b"Connection: keep-alive", version=b"1.0"),
    "Expect": post(b"/publish", DATA, b"Expect: 100-continue"),
    "Expect of a poll": post(b"/poll", POLL_BODY, b"Expect: 100-continue"),
    "Expect of a GET": get(b"/poll?channel=a&timeout=0", b"Expect: 100-continue"),
    "Expect of nothing": post(b"/nothing", DATA, b"Expect: 100-continue"),
    "Expect something else": post(b"/publish", DATA, b"Expect: more"),
    "Expect something that is not UTF-8": post(b"/publish", DATA, b"Expect: \xff"),
    "Expect something else of a poll": post(b"/poll", POLL_BODY, b"Expect: more"),
    "Upgrade to HTTP/2": get(b"/poll?channel=a&timeout=0", b"Upgrade: h2c", b"Connection: Upgrade"),
    "Upgrade of a publication to HTTP/2": post(b"/publish", DATA, b"Upgrade: h2c", b"Connection: Upgrade"),
    "Upgrade to WebSocket": get(b"/poll?channel=a&timeout=0", b"Upgrade: websocket", b"Connection: Upgrade"),
    "Upgrade without Connection": get(b"/poll?channel=a&timeout=0", b"Upgrade: websocket"),
    "Content-Encoding": post(b"/publish", DATA, b"Content-Encoding: gzip"),
    "Content-Encoding of a poll": post(b"/poll", POLL_BODY, b"Content-Encoding: br"),
    "Content-Encoding: identity": post(b"/poll", POLL_BODY, b"Content-Encoding: identity"),
    "Content-Encoding of nothing": get(b"/poll?channel=a&timeout=0", b"Content-Encoding: gzip"),
    "Range": get(b"/poll?channel=a&timeout=0", b"Range: bytes=0-1"),
    "chunked publish": chunked(b"/publish", DATA),
    "chunked publish, poll": chunked(b"/publish", DATA[:9], DATA[9:]) + POLL,
    "chunked poll": chunked(b"/poll", POLL_BODY),
    "chunked, trailers": chunked(b"/publish", DATA, end=b"0\r\nX: y\r\n\r\n"),
    "chunked 404": chunked(b"/nothing", DATA),
    "chunked GET": get(b"/poll?channel=a&timeout=0", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
}

TARGETS = {
    "no query": get(b"/poll"),
    "an empty query": get(b"/poll?"),
    "an empty parameter": get(b"/poll?&channel=a&&timeout=0&"),
    "two question marks": get(b"/poll??channel=a"),
    "an unknown parameter": get(b"/poll?channel=a&x=1"),
    "percent-encoded": get(b"/poll?%63hannel=%61&timeout=%30"),
    "percent-encoded UTF-8": get(b"/poll?channel=%E2%82%AC&timeout=0"),
    "percent-encoded Latin-1": get(b"/poll?channel=%E4"),
    "percent-encoded surrogate": get(b"/poll?channel=%ED%A0%80"),
    "percent-encoded NUL": get(b"/poll?channel=%00"),
    "percent-encoded line break": get(b"/poll?channel=a%0d%0aX:%20y"),
    "wrong percent-encoding": get(b"/poll?channel=%4"),
    "wrong percent-encoding of a name": get(b"/poll?%zz=1"),
    "plus": get(b"/poll?channel=a+b&timeout=0"),
    "semicolons": get(b"/poll?channel=a;timeout=0"),
    "percent-encoded path": get(b"/%70oll?channel=a&timeout=0"),
    "/poll%20": get(b"/poll%20?channel=a"),
    "/poll/": get(b"/poll/?channel=a"),
    "/poll/x": get(b"/poll/x?channel=a"),
    "/polls": get(b"/polls?channel=a"),
    "//poll": get(b"//poll?channel=a"),
    "/./poll": get(b"/./poll?channel=a&timeout=0"),
    "/x/../poll": get(b"/x/../poll?channel=a&timeout=0"),
    "/POLL": get(b"/POLL?channel=a"),
    "path parameters": get(b"/poll;x=y?channel=a"),
    "fragment": get(b"/poll?channel=a&timeout=0#x"),
    "fragment before the query": get(b"/poll#x?channel=a"),
    "absolute-form": get(b"http://test/poll?channel=a&timeout=0"),
    "absolute-form of another host": get(b"http://other:1/poll?channel=a&timeout=0"),
    "absolute-form without a host": get(b"http:///poll?channel=a"),
    "absolute-form with a broken host": get(b"http://[::1/poll?channel=a"),
    "absolute-form with a strange scheme": get(b"ftp://test/poll?channel=a&timeout=0"),
    "no slash": get(b"poll?channel=a"),
    "no path": get(b"?channel=a"),
    "backslash": get(b"\\poll?channel=a"),
    "brackets": get(b"/poll?channel[]=a"),
    "quotation mark": get(b'/poll?channel="a"&timeout=0'),
    "target in Latin-1": get(b"/poll?channel=\xe4"),
    "NUL in the target": get(b"/poll?channel=\x00"),
    "tab in the target": get(b"/poll?channel=\t"),
    "space in the target": get(b"/poll?channel=a b"),
    "DEL in the target": get(b"/poll?channel=\x7f"),
    "a channel with a slash": get(b"/channels/a%2Fb"),
    "a channel with braces": get(b"/channels/%7Ba%7D"),
    "a channel that is not UTF-8": get(b"/channels/%ff"),
    "a channel that is dots": get(b"/channels/.."),
}

LIMITS = {
    "a target of 8190 bytes": get(b"/poll?channel=" + b"a" * 8176),
    "a target of 8191 bytes": get(b"/poll?channel=" + b"a" * 8177),
    "a field of 8190 bytes": get(b"/poll?channel=a&timeout=0", b"X: " + b"a" * 8189),
    "a value of 8191 bytes": get(b"/poll?channel=a&timeout=0", b"X: " + b"a" * 8191),
    "a name of 8191 bytes": get(b"/poll?channel=a&timeout=0", b"X" * 8191 + b": a"),
    "a head of 8190 bytes": get(b"/poll?channel=a&timeout=0", b"X: " + b"a" * (8190 - 63)),
    "a head of 15000 bytes": get(b"/poll?channel=a&timeout=0", *[b"X-%d: %b" % (n, b"a" * 3000) for n in range(5)]),
    "128 headers": get(b"/poll?channel=a&timeout=0", *[b"X-%d: y" % n for n in range(127)]),
    "129 headers": get(b"/poll?channel=a&timeout=0", *[b"X-%d: y" % n for n in range(128)]),
    "a hundred blank lines": b"\r\n" * 100 + POLL,
    "blank lines of LF": b"\n\n" + POLL,
    "blank lines of CR": b"\r\r" + POLL,
    "blank lines between": POLL + b"\r\n\r\n" + POLL,
    "blank lines before a publication": b"\r\n" + PUBLISH + b"\r\n" + PUBLISH,
    "a blank first": b" " + POLL,
}

MALFORMED = {
    "no host": b"GET /poll?channel=a HTTP/1.1\r\n\r\n",
    "two hosts": get(b"/poll?channel=a", b"Host: other"),
    "two user agents": get(b"/poll?channel=a", b"User-Agent: a", b"User-Agent: b"),
    "two content types": post(b"/publish", DATA, b"Content-Type: a", b"Content-Type: b"),
    "two accepts": get(b"/poll?channel=a&timeout=0", b"Accept: a", b"Accept: b"),
    "an old WebSocket": get(b"/poll?channel=a", b"Sec-WebSocket-Key1: a"),
    "obs-fold": get(b"/poll?channel=a", b"X: a", b" b"),
    "obs-fold of the first header": b"GET /poll?channel=a HTTP/1.1\r\n Host: test\r\n\r\n",
    "bare LF": POLL.replace(b"\r\n", b"\n"),
    "bare LF at the end": POLL[:-2] + b"\n",
    "bare LF after the request line": POLL.replace(b"\r\n", b"\n", 1),
    "bare LF in a value": get(b"/poll?channel=a", b"X: a\nY: b"),
    "bare CR in a value": get(b"/poll?channel=a", b"X: a\rY: b"),
    "bare CR at the end": POLL[:-2] + b"\r\r\n",
    "NUL in a value": get(b"/poll?channel=a", b"X: a\x00"),
    "NUL in a name": get(b"/poll?channel=a", b"X\x00: a"),
    "space before a colon": get(b"/poll?channel=a", b"X : a"),
    "a header without a name": get(b"/poll?channel=a", b": a"),
    "a header without a colon": get(b"/poll?channel=a", b"X"),
    "a header that is not ASCII": get(b"/poll?channel=a&timeout=0", b"X: \xff\xe4"),
    "a name that is not ASCII": get(b"/poll?channel=a", b"\xff: a"),
    "an empty header": get(b"/poll?channel=a&timeout=0", b"X:", b"Y: "),
    "two spaces": b"GET  /poll?channel=a&timeout=0  HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab for a space": POLL.replace(b" ", b"\t", 1),
    "space after the version": POLL.replace(b"HTTP/1.1", b"HTTP/1.1 "),
    "HTTP/0.9": b"GET /poll?channel=a&timeout=0\r\n\r\n",
    "HTTP/1.2": get(b"/poll?channel=a&timeout=0", version=b"1.2"),
    "HTTP/2.0": get(b"/poll?channel=a&timeout=0", version=b"2.0"),
    "HTTP/11": get(b"/poll?channel=a", version=b"11"),
    "http/1.1": POLL.replace(b"HTTP", b"http"),
    "RTSP/1.0": POLL.replace(b"HTTP/1.1", b"RTSP/1.0"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "method in lower case": POLL.replace(b"GET", b"get"),
    "a method nobody knows": get(b"/poll?channel=a", method=b"POLL"),
    "a method of another protocol": get(b"/poll?channel=a", method=b"SOURCE"),
    "no target": b"GET HTTP/1.1\r\n" + HOST + b"\r\n",
    "words": b"hello\r\n\r\n",
    "a response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}

SMUGGLING = {
    "CL.TE": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked"),
    "CL.TE by publish": post(b"/publish", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked"),
    "TE.CL": get(b"/poll", b"Transfer-Encoding: chunked", b"Content-Length: 4", method=b"POST")
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN),
    "TE.CL by GET": get(b"/poll?channel=a&timeout=0", b"Transfer-Encoding: chunked", b"Content-Length: 0") + HIDDEN,
    "TE.TE, unknown last": get(b"/poll", b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", method=b"POST")
    + b"0\r\n\r\n"
    + HIDDEN,
    "TE.TE in one": get(b"/poll", b"Transfer-Encoding: chunked, identity", method=b"POST") + b"0\r\n\r\n" + HIDDEN,
    "TE, identity": post(b"/poll", HIDDEN, b"Transfer-Encoding: identity"),
    "TE, x": get(b"/poll", b"Transfer-Encoding: xchunked", method=b"POST") + HIDDEN,
    "TE, quoted": get(b"/poll", b'Transfer-Encoding: "chunked"', method=b"POST") + b"0\r\n\r\n" + HIDDEN,
    "TE, vertical tab": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding:\x0bchunked"),
    "TE, space before the colon": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding : chunked"),
    "TE, folded": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding:", b" chunked"),
    "TE, after NUL": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"X: \x00", b"Transfer-Encoding: chunked"),
    "TE, after a bare CR": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"X: y\rTransfer-Encoding: chunked"),
    "TE, after a bare LF": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"X: y\nTransfer-Encoding: chunked"),
    "TE, underscore": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer_Encoding: chunked"),
    "TE in HTTP/1.0": get(b"/poll", b"Transfer-Encoding: chunked", method=b"POST", version=b"1.0") + HIDDEN,
    "TE, capitals": get(b"/poll", b"TRANSFER-ENCODING: CHUNKED", method=b"POST") + b"0\r\n\r\n" + POLL,
    "CL.CL": get(b"/poll", b"Content-Length: 0", b"Content-Length: %d" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL.CL, equal": get(b"/poll", b"Content-Length: 0", b"Content-Length: 0", method=b"POST") + HIDDEN,
    "CL, list": get(b"/poll", b"Content-Length: 0, %d" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, plus": get(b"/poll", b"Content-Length: +%d" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, minus": get(b"/poll", b"Content-Length: -1", method=b"POST") + HIDDEN,
    "CL, hexadecimal": get(b"/poll", b"Content-Length: 0x%x" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, underscore": get(b"/poll", b"Content-Length: 1_0", method=b"POST") + HIDDEN,
    "CL, white space inside": get(b"/poll", b"Content-Length: 0 %d" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, white space around": get(b"/poll", b"Content-Length: \t%d \t" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, zeros": get(b"/poll", b"Content-Length: 00%d" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, empty": get(b"/poll", b"Content-Length:", method=b"POST") + HIDDEN,
    "CL, space before the colon": get(b"/poll", b"Content-Length : %d" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, folded": get(b"/poll", b"Content-Length:", b" %d" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, 2**64": get(b"/poll", b"Content-Length: 18446744073709551616", method=b"POST") + HIDDEN,
    "CL, 2**64 and the length": get(b"/poll", b"Content-Length: %d" % (2**64 + len(HIDDEN)), method=b"POST") + HIDDEN,
    "CL, 2**64 - 1": get(b"/publish", b"Content-Length: 18446744073709551615", method=b"POST") + HIDDEN,
    "CL, Arabic digits": get(b"/poll", b"Content-Length: \xd9\xa1", method=b"POST") + HIDDEN,
    "a body on a GET": post(b"/poll?channel=a&timeout=0", HIDDEN, method=b"GET"),
    "a body on a HEAD": post(b"/poll?channel=a&timeout=0", HIDDEN, method=b"HEAD"),
    "a body on a DELETE": post(b"/channels/a", HIDDEN, method=b"DELETE"),
    "a body on an OPTIONS": post(b"/poll", HIDDEN, method=b"OPTIONS"),
    "a body of a poll": post(b"/poll", HIDDEN),
    "a body of a poll with a query": post(b"/poll?channel=a", HIDDEN),
    "a body of a publication": post(b"/publish", HIDDEN),
    "a body of a 404": post(b"/nothing", HIDDEN),
    "a body that is expected": post(b"/nothing", HIDDEN, b"Expect: 100-continue"),
    "a body of an upgrade": post(b"/publish", HIDDEN, b"Upgrade: h2c", b"Connection: Upgrade"),
    "a body of a WebSocket": post(b"/poll", HIDDEN, b"Upgrade: websocket", b"Connection: Upgrade"),
    "chunk extensions": chunked(b"/publish", end=b"1b;x=y\r\n" + DATA + b"\r\n0;z\r\n\r\n"),
    "a chunk extension with a line break": chunked(b"/publish", end=b"0;x\n\r\n\r\n" + HIDDEN),
    "a chunk extension with CR": chunked(b"/publish", end=b"0;x\ry\r\n\r\n" + HIDDEN),
    "a chunk size with a sign": chunked(b"/publish", end=b"+0\r\n\r\n" + HIDDEN),
    "a chunk size with a prefix": chunked(b"/publish", end=b"0x0\r\n\r\n" + HIDDEN),
    "a chunk size with a space": chunked(b"/publish", end=b"0 \r\n\r\n" + HIDDEN),
    "a chunk size that is huge": chunked(b"/publish", end=b"fffffffffffffffff\r\n\r\n" + HIDDEN),
    "a chunk without an end": chunked(b"/publish", end=b"1\r\nxx\r\n0\r\n\r\n" + HIDDEN),
    "chunks that end with LF": chunked(b"/publish", end=b"0\n\n" + HIDDEN),
    "trailers that are headers": chunked(b"/publish", end=b"0\r\nContent-Length: %d\r\n\r\n" % len(DATA)) + POLL,
    "a head in two": POLL[:-2] + HIDDEN,
    "a line too many": POLL[:-2] + b"\r\r\n\r\n" + HIDDEN,
    "after Connection: close": get(b"/poll?channel=a&timeout=0", b"Connection: close") + HIDDEN,
    "after HTTP/1.0": get(b"/poll?channel=a&timeout=0", version=b"1.0") + HIDDEN,
    "after HTTP/0.9": b"GET /poll?channel=a&timeout=0\r\n" + HIDDEN,
    "after a refused upgrade": get(b"/nothing", b"Upgrade: websocket", b"Connection: Upgrade") + POLL,
    "TE, tab": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding:\tchunked"),
    "TE, blank behind": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked "),
    "TE, NUL before": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: \x00chunked"),
    "TE, parameter": get(b"/poll", b"Transfer-Encoding: chunked;q=1", method=b"POST") + b"0\r\n\r\n" + HIDDEN,
    "TE, empty": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding:"),
    "TE, comma": get(b"/poll", b"Transfer-Encoding: ,chunked", method=b"POST") + b"0\r\n\r\n" + POLL,
    "TE, identity first": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: identity, chunked"),
    "TE, gzip first": get(b"/poll", b"Transfer-Encoding: gzip, chunked", method=b"POST") + b"0\r\n\r\n" + POLL,
    "TE, twice": get(b"/poll", b"Transfer-Encoding: chunked, chunked", method=b"POST") + b"0\r\n\r\n" + HIDDEN,
    "TE.TE, equal": post(b"/poll", b"0\r\n\r\n" + HIDDEN, *[b"Transfer-Encoding: chunked"] * 2),
    "TE.TE, unknown first": post(
        b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: x", b"Transfer-Encoding: chunked"
    ),
    "TE.TE, a blank name": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b" Transfer-Encoding: chunked"),
    "TE.CL, the length first": get(b"/poll", b"Content-Length: 4", b"Transfer-Encoding: chunked", method=b"POST")
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN),
    "TE in HTTP/1.0, kept alive": get(
        b"/poll", b"Transfer-Encoding: chunked", b"Connection: keep-alive", method=b"POST", version=b"1.0"
    )
    + b"0\r\n\r\n"
    + HIDDEN,
    "TE and CL in HTTP/1.0": post(b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked", version=b"1.0"),
    "TE is named in Connection": post(
        b"/poll", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked", b"Connection: Transfer-Encoding"
    ),
    "CL is named in Connection": post(b"/poll", HIDDEN, b"Connection: Content-Length"),
    "CL.CL, the longer first": get(b"/poll", b"Content-Length: %d" % len(HIDDEN), b"Content-Length: 0", method=b"POST")
    + HIDDEN,
    "CL, blanks around and inside": get(b"/poll", b"Content-Length:  5 5", method=b"POST") + HIDDEN,
    "CL, underscore in the name": get(b"/poll", b"Content_Length: %d" % len(HIDDEN), method=b"POST") + POLL,
    "CL, letters": get(b"/poll", b"Content-Length: %dabc" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, point": get(b"/poll", b"Content-Length: %d.0" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, list of equals": get(b"/poll", b"Content-Length: %d, %d" % (len(HIDDEN), len(HIDDEN)), method=b"POST")
    + HIDDEN,
    "CL, NUL": get(b"/poll", b"Content-Length: %d\x00" % len(HIDDEN), method=b"POST") + HIDDEN,
    "CL, bare CR behind": get(b"/poll", b"Content-Length: 0\rX: y", method=b"POST") + HIDDEN,
    "all lines end with CR": POLL.replace(b"\r\n", b"\r") + HIDDEN,
    "all lines end with LF": post(b"/poll", HIDDEN).replace(b"\r\n", b"\n"),
    "a chunk extension that is long": chunked(b"/publish", end=b"0;" + b"x" * 3000 + b"\r\n\r\n") + POLL,
    "a chunk extension in quotes": chunked(b"/publish", end=b'0;a="b;c"\r\n\r\n') + POLL,
    "a chunk extension in quotes that go on": chunked(b"/publish", end=b'0;a="\r\n\r\n"') + HIDDEN,
    "a chunk size with zeros": chunked(b"/publish", end=b"00000000000000001b\r\n" + DATA + b"\r\n000\r\n\r\n") + POLL,
    "a chunk size of 2**64": chunked(b"/publish", end=b"10000000000000000\r\n\r\n" + HIDDEN),
    "a chunk size of 2**64 and a bit": chunked(b"/publish", end=b"1000000000000001b\r\n" + DATA + b"\r\n0\r\n\r\n"),
    "a chunk size of 2**63": chunked(b"/publish", end=b"8000000000000000\r\n\r\n" + HIDDEN),
    "a chunk size with garbage": chunked(b"/publish", end=b"0xyz\r\n\r\n" + HIDDEN),
    "a chunk size with a minus": chunked(b"/publish", end=b"-1\r\n\r\n" + HIDDEN),
    "a chunk size with an underscore": chunked(b"/publish", end=b"1_0\r\n\r\n" + HIDDEN),
    "a chunk size that is missing": chunked(b"/publish", end=b"\r\n\r\n" + HIDDEN),
    "a chunk with a long end": chunked(b"/publish", end=b"1b\r\n" + DATA + b"XX0\r\n\r\n" + HIDDEN),
    "a chunk that ends with LF": chunked(b"/publish", end=b"1b\r\n" + DATA + b"\n0\r\n\r\n" + HIDDEN),
    "a chunk that ends with CR": chunked(b"/publish", end=b"1b\r\n" + DATA + b"\r0\r\n\r\n" + HIDDEN),
    "chunks that end with CR": chunked(b"/publish", end=b"0\r\r" + HIDDEN),
    "trailers that are folded": chunked(b"/publish", end=b"0\r\nX: y\r\n z\r\n\r\n") + POLL,
    "trailers that carry TE": chunked(b"/publish", end=b"0\r\nTransfer-Encoding: chunked\r\n\r\n") + POLL,
    "trailers without an end": chunked(b"/publish", end=b"0\r\n" + HIDDEN),
    "a body on an absolute-form": post(b"http://other/publish", HIDDEN),
    "a chunked body on a GET": get(b"/poll?channel=a&timeout=0", b"Transfer-Encoding: chunked")
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN),
    "a chunked body that is expected": chunked(b"/nothing", HIDDEN, headers=[b"Expect: 100-continue"]),
    "a chunked body of an upgrade": chunked(b"/publish", HIDDEN, headers=[b"Upgrade: h2c", b"Connection: Upgrade"]),
    "an upgrade to HTTP/2 with settings": post(
        b"/poll",
        HIDDEN,
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        b"Connection: Upgrade, HTTP2-Settings",
    ),
    "a body of a CONNECT": post(b"/poll", HIDDEN, method=b"CONNECT"),
    "a body of a TRACE": post(b"/poll", HIDDEN, method=b"TRACE"),
}
EXECUTED = {"a head in two"}
"""Of these the hidden part is a request in its own right, or so both sides see it."""

CASES = {**ORDINARY, **TARGETS, **LIMITS, **MALFORMED, **SMUGGLING}

REFUSED_WHOLE = """\
When a segment goes on after the last request of its connection, aiohttp refuses the whole segment. The lane answers the
request and ignores the rest, as aiohttp does when the rest comes in a segment of its own."""
LOST = """\
When a segment goes on after a request that offers another protocol, aiohttp loses the rest of the segment. The lane
answers that too, as aiohttp does when it comes in a segment of its own."""

DIFFERENCES = {
    "Connection: close": REFUSED_WHOLE,
    "Connection: close in a list": REFUSED_WHOLE,
    "Connection: close by POST": REFUSED_WHOLE,
    "publish, Connection: close": REFUSED_WHOLE,
    "wrong poll, Connection: close": REFUSED_WHOLE,
    "HTTP/1.0": REFUSED_WHOLE,
    "HTTP/1.0 without a host": REFUSED_WHOLE,
    "HTTP/1.0 publish": REFUSED_WHOLE,
    "RTSP/1.0": REFUSED_WHOLE,
    "after Connection: close": REFUSED_WHOLE,
    "after HTTP/1.0": REFUSED_WHOLE,
    "Upgrade to HTTP/2": LOST,
    "Upgrade of a publication to HTTP/2": LOST,
    "a body of an upgrade": LOST,
    "an upgrade to HTTP/2 with settings": LOST,
}
"""The cases in which the lane does better than aiohttp in one segment, with the reason. Byte by byte there are none."""

Connect = Callable[[Server], pipes.Pipe]


@dataclass(frozen=True)
class Seen:
    """All that a client sees."""

    responses: list[pipes.Response]
    closed: bool
    handed_over: bool = field(compare=False)


def normalise(response: pipes.Response) -> pipes.Response:
    """The response without what differs from one server or moment to the next."""
    headers = {name: value for name, value in response.headers.items() if name != "date"}
    return response._replace(headers=headers, body=re.sub(rb"\d{16}", b"ID", response.body))


async def exchange(connect: Connect, server: Server, segments: Sequence[bytes], *, patient: bool = False) -> Seen:
    """Send the segments, each after the one before was served if `patient`, and hang up."""
    pipe = connect(server)
    if patient:
        await pipe.receive(*segments)
    else:
        for segment in segments:
            pipe.push(segment)
        await pipe.settle()
    responses = [normalise(response) for response in pipe.responses]
    seen = Seen(responses, pipe.closing, not isinstance(pipe.protocol, Lane))
    pipe.hang_up()
    await pipe.settle()
    return seen


def split(data: bytes) -> list[bytes]:
    return [data[n : n + 1] for n in range(len(data))]


SETTINGS = {"body_bytes_max": 4096, "channel_max_messages": 3}


@asynccontextmanager
async def twins() -> AsyncIterator[tuple[Server, Server]]:
    """Two servers that know nothing of each other."""
    async with running(**SETTINGS) as server, running(**SETTINGS) as reference:
        yield server, reference


async def forget(*servers: Server) -> None:
    """Close all channels."""
    for server in servers:
        for info in await server.node.broker.channels("", 1000):
            await server.node.broker.close(info.channel)


def check(seen: Seen) -> None:
    """Nothing is ever the server's fault, and every error is a problem document that says its status."""
    for response in seen.responses:
        assert response.status < 500
        if response.status >= 400:
            assert response.headers["content-type"] == "application/problem+json"
            assert not response.body or response.json["status"] == response.status


@pytest.mark.parametrize("name", CASES)
async def test_byte_by_byte_the_lane_answers_as_aiohttp_does(name: str) -> None:
    """Same status lines, headers, bodies, number of answers and end of the connection."""
    async with twins() as (server, reference):
        segments = split(CASES[name] + AFTER)

        seen = await exchange(pipes.lane, server, segments)
        expected = await exchange(pipes.aiohttp, reference, segments)

        assert seen == expected
        check(seen)
        assert server.node.parked == 0
        assert not server._lanes.open


@pytest.mark.parametrize("name", CASES)
async def test_in_one_segment_the_lane_answers_as_byte_by_byte(name: str) -> None:
    """How requests are cut into segments changes nothing. What was handed over is aiohttp's, which is not so steady."""
    async with twins() as (server, other):
        data = CASES[name] + AFTER

        seen = await exchange(pipes.lane, server, [data])
        expected = await exchange(pipes.lane, other, split(data))

        assert seen == expected or seen.handed_over
        assert seen.handed_over == expected.handed_over


@pytest.mark.parametrize("name", CASES)
async def test_in_one_segment_the_lane_answers_as_aiohttp_does(name: str) -> None:
    """The same again, but for the listed cases, in which aiohttp answers less."""
    async with twins() as (server, reference):
        data = CASES[name] + AFTER

        seen = await exchange(pipes.lane, server, [data])
        expected = await exchange(pipes.aiohttp, reference, [data])

        if name in DIFFERENCES:
            assert seen != expected, "no longer a difference"
        else:
            assert seen == expected


@pytest.mark.parametrize("name", SMUGGLING)
@pytest.mark.parametrize("whole", [True, False])
async def test_nothing_is_smuggled(name: str, whole: bool) -> None:
    """What is hidden in a request is not executed as another."""
    async with running(**SETTINGS) as server:
        data = SMUGGLING[name]

        await exchange(pipes.lane, server, [data] if whole else split(data))

        if name not in EXECUTED:
            with pytest.raises(ChannelNotFound):
                await server.node.broker.describe("hidden")


def test_there_are_cases_enough() -> None:
    """The tables did not shrink by accident, and the list of differences names cases."""
    assert len(CASES) >= 200
    assert set(DIFFERENCES) <= set(CASES)


def _requests() -> st.SearchStrategy[bytes]:
    return st.sampled_from(
        [
            POLL,
            post(b"/poll", POLL_BODY),
            get(b"/poll?channel=a&timeout=0", method=b"HEAD"),
            get(b"/poll?channel=a&timeout=0", b"Connection: keep-alive", version=b"1.0"),
            PUBLISH,
            post(b"/publish", DATA, b"Expect: 100-continue"),
            get(b"/channels/a"),
            post(b"/nothing", DATA),
            chunked(b"/publish", DATA[:9], DATA[9:]),
            get(b"/nothing", b"Upgrade: websocket", b"Connection: Upgrade"),
        ]
    )


_PIECES = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b" ",
        b"\t",
        b"\x00",
        b"\xff",
        b":",
        b",",
        b";",
        b"0",
        b"1",
        b"f",
        b"+",
        b"-",
    ),
    *(
        b"?",
        b"#",
        b"%",
        b"%41",
        b"%zz",
        b"/",
        b"&",
        b"=",
        b"GET ",
        b"HEAD ",
        b"POST ",
        b"HTTP/1.0",
        b"HTTP/1.1",
        b"HTTP/2",
    ),
    *(b"Content-Length: 0\r\n", b"Content-Length: 5\r\n", b"Content-Length: 300\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"Expect: x\r\n"),
    *(
        b"Connection: close\r\n",
        b"Connection: keep-alive\r\n",
        b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        b"Host: b\r\n",
    ),
    *(b"Content-Encoding: gzip\r\n", b"X: y\r\n", b"http://test", b"{", b"}", b"[", b'"', b"\\", b"\\ud800", b"NaN"),
]


@st.composite
def _mutations(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """One to three valid requests with up to four changes, and where to cut them into segments."""
    data = b"".join(draw(st.lists(_requests(), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.sampled_from([0, 0, 1, 2, 10]))
        copied = draw(st.integers(0, len(data)))
        piece = draw(st.one_of(st.sampled_from(_PIECES), st.just(data[copied : copied + 20]), st.just(b"")))
        data = data[:start] + piece + data[end:]
    return data, sorted(draw(st.sets(st.integers(1, len(data) + len(AFTER)), max_size=4)))


def test_mutated_requests_are_answered_alike() -> None:
    """Whatever becomes of valid requests, the lane answers as aiohttp does, in whatever segments they come."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        server, reference = runner.run(stack.enter_async_context(twins()))
        third = runner.run(stack.enter_async_context(running(**SETTINGS)))

        async def observe(data: bytes, cuts: list[int]) -> tuple[Seen, Seen, Seen]:
            segments = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
            await forget(server, reference, third)
            seen = await exchange(pipes.lane, server, split(data))
            expected = await exchange(pipes.aiohttp, reference, split(data))
            cut = await exchange(pipes.lane, third, segments, patient=True)
            if seen != expected and seen.handed_over:
                # aiohttp was handed many bytes in one segment, and what it makes of those depends on segments.
                await forget(server, reference)
                seen = await exchange(pipes.lane, server, split(data), patient=True)
                expected = await exchange(pipes.aiohttp, reference, split(data), patient=True)
            return seen, expected, cut

        @settings(derandomize=True, deadline=None, max_examples=400)
        @given(_mutations())
        def compare(mutation: tuple[bytes, list[int]]) -> None:
            data, cuts = mutation

            seen, expected, cut = runner.run(observe(data + AFTER, cuts))

            assert seen == expected
            assert cut == seen or cut.handed_over
            assert cut.handed_over == seen.handed_over
            check(seen)
            check(cut)
            assert server.node.parked == third.node.parked == 0
            assert not server._lanes.open
            assert not third._lanes.open

        try:
            compare()
        finally:
            runner.run(stack.aclose())
