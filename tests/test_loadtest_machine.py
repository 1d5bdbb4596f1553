"""How the kernel's files are read."""

import os
import select
import socket
import threading

from loadtest.machine import (
    Cores,
    Memory,
    Ran,
    Stat,
    family,
    parse_memory,
    parse_stat,
    plan_cores,
    ran,
    wait_for_events,
)

ROLLUP = """\
55c0c5f3c000-7ffe10dcc000 ---p 00000000 00:00 0                          [rollup]
Rss:                1636 kB
Pss:                 291 kB
Pss_Dirty:           112 kB
Pss_Anon:            112 kB
Pss_File:            175 kB
Pss_Shmem:             4 kB
"""


def test_memory_is_what_the_processes_allocated() -> None:
    found = parse_memory(ROLLUP)

    assert found == Memory(112 * 1024, 4 * 1024, 291 * 1024)
    assert found.own == 116 * 1024
    assert (found - Memory(1024, 1024, 1024)).own == 114 * 1024


def test_a_command_may_be_named_like_the_rest_of_the_line() -> None:
    fields = "R 1 7 7 0 -1 4194560 10 0 0 0 250 50 0 0 20 0 1 0 99"

    assert parse_stat(f"7 (nginx: (x) S 3) {fields}") == Stat("R", 1, 300)


def test_server_and_client_get_a_core_each_if_there_are_two() -> None:
    cores = plan_cores({3, 1, 2})

    assert cores == Cores(frozenset({1}), frozenset({2}))
    assert str(cores) == "server pinned to core 1, client (which spins) to core 2"


def test_one_core_is_shared() -> None:
    cores = plan_cores({5})

    assert not cores.pinned
    assert "not pinned" in str(cores)


def test_this_process_has_run_and_is_of_its_own_family() -> None:
    assert ran((os.getpid(),)).cpu > 0
    assert Ran(5, 3) - Ran(2, 1) == Ran(3, 2)
    assert os.getpid() in family(os.getppid())


def test_events_are_waited_for() -> None:
    """What has come is told at once, and so is what comes in time; otherwise nothing, once the time is up."""
    ours, theirs = socket.socketpair()
    with ours, theirs, select.epoll() as epoll:
        epoll.register(ours, select.EPOLLIN)
        nothing = wait_for_events(epoll, 200_000, 9)
        later = threading.Timer(0.01, theirs.send, (b"x",))
        later.start()
        came = wait_for_events(epoll, 60_000_000_000, 9)
        later.join()
        is_there = wait_for_events(epoll, 0, 9)

        assert nothing == []
        assert came == is_there == [(ours.fileno(), select.EPOLLIN)]
