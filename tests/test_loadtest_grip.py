"""The origin behind Pushpin, without Pushpin."""

from loadtest.grip import answer


def test_a_poll_is_to_be_held_on_each_of_its_channels() -> None:
    assert answer(b"GET /poll?id=a,b HTTP/1.1\r\nHost: x", 120) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n"
        b"Grip-Hold: response\r\nGrip-Timeout: 120\r\nGrip-Channel: a\r\nGrip-Channel: b\r\n\r\n"
    )


def test_anything_else_is_answered_at_once() -> None:
    assert answer(b"GET / HTTP/1.1", 120) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n"
    )
