"""A network of its own: only root can have one, and everybody gets back to where they were."""

import os
from pathlib import Path

import pytest

from loadtest import network
from loadtest.network import connections_left, own_network


def inode() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_the_network_is_another_one_only_inside() -> None:
    before = inode()

    with own_network() as own:
        assert (inode() != before) == own

    assert inode() == before


@pytest.mark.parametrize(("count", "left"), [("262000\n", 144), ("0\n", None)])
def test_connections_left_are_those_that_may_still_be_tracked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: str, left: int | None
) -> None:
    (tmp_path / "count").write_text(count)
    (tmp_path / "max").write_text("262144\n")
    monkeypatch.setattr(network, "_TRACKED", tmp_path / "count")
    monkeypatch.setattr(network, "_TRACKED_MAX", tmp_path / "max")

    assert connections_left() == left


def test_a_kernel_without_tracking_has_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "_TRACKED", tmp_path / "none")

    assert connections_left() is None
