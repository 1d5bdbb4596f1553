"""The crowds; measuring itself is the load test."""

from collections import Counter

from loadtest.crowds import browser_headers, make_columns


def test_each_column_of_channels_reaches_every_poll_once() -> None:
    polls = make_columns(400, 10, 20)
    heard = Counter(channel for channels in polls for channel in channels)

    assert all(len(set(channels)) == 10 for channels in polls)
    assert set(heard.values()) == {20}
    assert [channels[3] for channels in polls] != sorted(channels[3] for channels in polls)
    assert all(channels[3].startswith("c3n") for channels in polls)


def test_no_two_browsers_are_alike_and_each_is_always_the_same() -> None:
    blocks = [browser_headers(index) for index in range(500)]

    assert browser_headers(7) == blocks[7]
    assert len(set(blocks)) == 500
    for name in (b"User-Agent", b"Cookie", b"X-Forwarded-For"):
        lines = {line for block in blocks for line in block.split(b"\r\n") if line.startswith(name)}
        assert len(lines) > 490, name
    assert all(block.endswith(b"\r\n") and block.count(b"\r\n") >= 12 for block in blocks)
