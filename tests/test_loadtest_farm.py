"""Nodes that a load test starts by the dozen."""

from pathlib import Path

import pytest

from loadtest.farm import Farm
from loadtest.servers import ServerError

JEMALLOC = "libjemalloc.so.2"


def test_a_node_has_the_allocator_that_was_asked_for() -> None:
    with Farm(redis=False, allocator=JEMALLOC) as farm:
        [node] = farm.grow(1)

        assert JEMALLOC in Path(f"/proc/{node.pid}/maps").read_text()


def test_an_allocator_that_is_missing_is_said_to_be() -> None:
    """The C library would go on with its own, and be measured instead."""
    with (
        Farm(redis=False, allocator="libmissing.so.7") as farm,
        pytest.raises(ServerError, match=r"^libmissing\.so\.7 is missing"),
    ):
        farm.grow(1)


def test_without_one_it_is_the_c_library_s() -> None:
    with Farm(redis=False) as farm:
        [node] = farm.grow(1)

        assert JEMALLOC not in Path(f"/proc/{node.pid}/maps").read_text()
