"""`python -m tests.fuzz.seeds` writes the seeds into the corpora, beside what the fuzzer has found."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.fuzz.lane import BODY, CHUNKS, FIELD, MARK
from tests.test_lane_differential import CASES, DATA, HIDDEN, POLL, POLL_BODY, PUBLISH, chunked, get, post

CORPUS: Final = Path(__file__).parent / "corpus"
SEED_BYTES_MAX: Final = 4096

PARK: Final = get(b"/poll?channel=a")

EVENTS: Final = {
    "answered while waiting": PARK + MARK + b"p" + POLL,
    "waits for two": get(b"/poll?channel=a&channel=b") + PUBLISH + MARK + b"p",
    "waits by post": post(b"/poll", b'{"channels":["a"]}') + MARK + b"p",
    "waits on the web side": chunked(b"/poll", b'{"channels":["a"]}') + MARK + b"p",
    "hangs up while waiting": PARK + MARK + b"h",
    "hangs up in a body": post(b"/publish", DATA)[:-5] + MARK + b"h",
    "hangs up in a chunked body": chunked(b"/publish", DATA, end=b"") + MARK + b"h",
    "waits and time passes": PARK + MARK + b"t" + POLL,
    "half a head and time passes": POLL[:-9] + MARK + b"t" + POLL[-9:],
    "half a body and time passes": post(b"/poll", POLL_BODY)[:-9] + MARK + b"t",
    "half a lent body and time passes": PUBLISH[:-9] + MARK + b"t",
    "idle and time passes": POLL + MARK + b"t" + POLL,
    "does not read": MARK + b"s" + POLL + MARK + b"*" + MARK + b"r" + POLL,
    "does not read publications' answers": MARK + b"s" + PUBLISH * 3 + MARK + b"r",
    "does not read and time passes": POLL + MARK + b"s" + POLL + MARK + b"t",
    "does not read while waiting": PARK + MARK + b"s" + POLL + MARK + b"p" + MARK + b"r",
    "many behind a waiting one": PARK + MARK + b"_" + POLL * 10 + MARK + b"*" + MARK + b"p",
    "many polls": POLL * 5 + MARK + b"*",
    "many publications": PUBLISH * 2 + MARK + b"*",
    "many blank lines": b"\r\n" * 100 + MARK + b"*" + POLL,
    "an endless head": b"GET /poll?channel=a HTTP/1.1\r\n" + MARK + b"_" + b"X-Y: z\r\n" * 10 + MARK + b"*",
    "an endless line": b"GET /poll?channel=" + MARK + b"_" + b"a" * 200 + MARK + b"*",
    "an endless chunk size": chunked(b"/publish", end=b"") + MARK + b"_" + b"0" * 200 + MARK + b"*",
    "an endless chunk extension": chunked(b"/publish", end=b"0;") + MARK + b"_" + b"x" * 200 + MARK + b"*",
    "endless trailers": chunked(b"/publish", end=b"0\r\n") + MARK + b"_" + b"X-Y: z\r\n" * 10 + MARK + b"*",
    "endless chunks": chunked(b"/publish", end=b"") + MARK + b"_" + b"1\r\nx\r\n" * 20 + MARK + b"*",
    "a long body to nobody": get(b"/nothing", b"Content-Length: 99999", method=b"POST")
    + MARK
    + b"_"
    + b"x" * 200
    + MARK
    + b"*"
    + POLL,
    "another request behind an upgrade": get(b"/poll?channel=a", b"Upgrade: h2c", b"Connection: Upgrade") + MARK + b"p",
    "body, a publication": BODY + HIDDEN,
    "body, chunks": BODY + b"0\r\n\r\n" + HIDDEN,
    "body, a publication of one": BODY + DATA + MARK + b"_" + HIDDEN,
    "chunks, a publication": CHUNKS + HIDDEN,
    "chunks, the last chunk": CHUNKS + b"0\r\n\r\n" + MARK + b"_" + HIDDEN,
    "chunks, data": CHUNKS + DATA[:9] + MARK + b"_" + DATA[9:],
    "field, a line": FIELD + b"x\r\n\r\n" + HIDDEN,
    "field, bytes": FIELD + bytes(range(1, 256)),
    "field, a length": FIELD + b"y\rContent-Length: 5",
}

JSON: Final = {
    "nested": b'{"channels":["a"],"data":' + b"[" * 150 + b"]" * 150 + b"}",
    "nested too deep for a parser": b'{"channels":["a"],"data":' + b'{"a":' * 1500,
    "numbers": b'{"channels":["a",1],"data":[1e400,-1e-400,9007199254740993,0.1,-0,1E5,12345678901234567890]}',
    "not numbers": b'{"channels":["a"],"data":[NaN,Infinity,-Infinity]}',
    "half a pair": b'{"channels":["a"],"data":"\\ud800"}',
    "a pair": b'{"channels":["a"],"data":"\\ud83d\\ude00 \\u0000\\u2028"}',
    "twice": b'{"channels":["a"],"channels":["b"],"data":1,"data":2}',
    "lines": b'{"channels":["a"],\r\n"data":[1,\r\n 2]}',
    "key": b'{"channels":["a"],"data":null,"key":"k"}',
    "batch": b'[{"channels":["a"],"data":1},{"channels":[]},7,{"channels":["a"],"data":2,"x":1}]',
    "overlong": b'{"channels":["\xc0\xaf"],"data":"\xed\xa0\x80"}',
    "a mark of order": b'\xef\xbb\xbf{"channels":["a"],"data":1}',
    "wide": '{"channels":["a"],"data":1}'.encode("utf-16"),
}

WIRE: Final = {
    "poll": b"P" + POLL_BODY,
    "poll, all": b'P{"channels":["a","b",17],"start":5,"end":9007199254740991,"timeout":0.5}',
    "poll, latest": b'P{"channels":["a"],"start":"latest"}',
    "poll, too large": b'P{"channels":["a"],"start":9007199254740992,"end":-1,"timeout":1e400}',
    "poll, floats": b'P{"channels":["a"],"start":5.0,"end":1e15,"timeout":-0.0}',
    "query": b"Qchannel=a&channel=b&start=5&end=10&timeout=2.5",
    "query, latest": b"Qchannel=%C3%A9+x&start=latest",
    "query, odd": b"Qchannel=%ff&start=+5&timeout=1_0&x=&channel=%",
    "options": b'C{"name":"a","ttl":60,"window":0.5,"max_messages":10}',
    "options, none": b"C",
    "renewal": b'R{"ttl":60}',
    "page": b"Lafter=a%2Fb&limit=1000",
    "segment": b"Sa%2Fb%20%E2%82%AC",
    **{f"publication, {name}": b"M" + text for name, text in JSON.items()},
    **{f"poll, {name}": b"P" + text for name, text in JSON.items()},
}


def seeds() -> Mapping[Path, bytes]:
    """All seeds, by file."""
    made: dict[Path, bytes] = {}
    for name, data in {**CASES, **EVENTS}.items():
        if len(data) <= SEED_BYTES_MAX:
            made[_path("lane", name)] = data
    heads = {f"head, {name}": b"H" + data for name, data in CASES.items() if len(data) <= SEED_BYTES_MAX}
    for name, data in {**heads, **WIRE}.items():
        made[_path("parsers", name)] = data
    return made


def _path(target: str, name: str) -> Path:
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return CORPUS / target / f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def main() -> None:
    for path, data in seeds().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
