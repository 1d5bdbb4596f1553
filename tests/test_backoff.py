"""Pauses between tries."""

from pushup.backoff import RETRY_AFTER_MAX_S, Backoff


def test_full_jitter() -> None:
    """From nothing to the limit, which doubles up to the most there is."""
    chances = iter([0.0, 0.999, 0.5, 0.5, 0.5, 0.5])
    backoff = Backoff(0.5, 3.0, lambda: next(chances))

    assert [backoff.next() for _ in range(6)] == [0.0, 0.999, 1.0, 1.5, 1.5, 1.5]


def test_what_the_server_asked_for() -> None:
    """Comes on top, so that nobody is early, and not all come at once; up to five minutes."""
    backoff = Backoff(0.5, 30.0, lambda: 0.5)

    assert [backoff.next(7), backoff.next(1e9)] == [7.25, RETRY_AFTER_MAX_S + 0.5]


def test_it_begins_anew() -> None:
    """When it went well."""
    backoff = Backoff(1.0, 30.0, lambda: 0.5)
    before = [backoff.next() for _ in range(9)]
    backoff.reset()

    assert (before[-1], backoff.next()) == (15.0, 0.5)


def test_it_never_overflows() -> None:
    """However often it fails."""
    backoff = Backoff(0.5, 30.0, lambda: 0.5)
    assert max(backoff.next() for _ in range(5000)) == 15.0
