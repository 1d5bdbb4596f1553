"""Programs, ports and processes of this machine: what is found, and who is signalled."""

import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ClusterError, Refused
from cluster.processes import (
    HOST,
    PORT_RANGE,
    Process,
    find_programs,
    free_ports,
    stop,
    wait_until,
    why_taken,
    write_atomically,
)
from tests.support import PATIENCE_S


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """A process that is not started yet, and is gone at the end."""
    process = Process(tmp_path, "sleeper", "127.0.0.1:1")
    yield process
    process.kill()


def sh(process: Process, script: str) -> None:
    process.launch(["/bin/sh", "-c", script])


def said(process: Process) -> str:
    """The first line of its log, as soon as there is one."""
    assert wait_until(lambda: "\n" in process.log.read_text(), PATIENCE_S)
    return process.log.read_text().splitlines()[0]


def test_programs_that_are_missing_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All at once, as one command installs them all."""
    monkeypatch.setattr("cluster.processes.SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "redis-cli"
    program.touch(0o755)

    assert find_programs("redis-cli") == [str(program)]
    with pytest.raises(Refused) as one:
        find_programs("haproxy", "redis-cli")
    assert str(one.value) == "haproxy is missing; on Debian: apt-get install haproxy"
    program.unlink()
    with pytest.raises(Refused) as both:
        find_programs("redis-cli", "haproxy")
    assert str(both.value) == "redis-cli and haproxy are missing; on Debian: apt-get install redis-tools haproxy"


def test_programs_are_found_where_debian_hides_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HAProxy is in /usr/sbin, which few people have in their PATH."""
    (tmp_path / "haproxy").touch(0o755)
    monkeypatch.setattr("cluster.processes.SYSTEM_PATH", f":{tmp_path}")
    monkeypatch.setenv("PATH", "/nowhere")

    assert find_programs("haproxy") == [str(tmp_path / "haproxy")]


def test_a_port_is_taken_while_somebody_listens() -> None:
    """On this address or on all; what closed connections leave behind does not count."""
    for host in (HOST, ""):
        with socket.create_server((host, 0)) as server:
            port = server.getsockname()[1]
            assert why_taken(port) == "Address already in use"
            with socket.create_connection((HOST, port)):
                server.accept()[0].close()
        assert why_taken(port) == ""


def test_free_ports_are_free_and_out_of_the_way() -> None:
    """All different, none that is taken, none that the kernel may give to a client."""
    first = int(PORT_RANGE.read_text().split()[0])

    ports = free_ports(200)
    others = free_ports(200, ports)

    assert len({*ports, *others}) == 400
    assert all(1024 < port < first for port in (*ports, *others))
    assert not any(map(why_taken, ports))


def test_ports_in_a_row_do_not_overlap() -> None:
    """Each has its followers for itself."""
    ports = free_ports(50, row=3)

    assert len({port + offset for port in ports for offset in range(3)}) == 150


def test_more_ports_than_there_are() -> None:
    """It says so, rather than give too few."""
    with pytest.raises(Refused, match="100000 free ports"):
        free_ports(100_000, range(65536))


def test_a_process_is_started_in_a_session_of_its_own(process: Process) -> None:
    """It leads it, so no closing terminal ends it; its output is in its log, and it is where its files are."""
    sh(process, "pwd; exec sleep 60")

    assert process.alive
    assert os.getsid(process.pid) == process.pid
    assert said(process) == str(process.directory)


def test_a_process_may_have_all_descriptors(process: Process) -> None:
    """A poll is one, and the soft limit is for programs that count on select."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)

    sh(process, "exec sleep 60")

    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (most, most)


def test_settings_of_the_terminal_do_not_reach_it(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of a cluster are what the cluster says, wherever it was started."""
    monkeypatch.setenv("PUSHUP_LINGER", "nonsense")
    monkeypatch.setenv("OTHER", "kept")

    sh(process, 'echo "${PUSHUP_LINGER-nothing} $OTHER"; exec sleep 60')

    assert said(process) == "nothing kept"


def test_another_command_knows_it_by_its_pid_file(process: Process, tmp_path: Path) -> None:
    """The object that started it is not needed."""
    sh(process, "exec sleep 60")
    same = Process(tmp_path, "sleeper", "127.0.0.1:1")

    assert (same.pid, same.alive) == (process.pid, True)
    same.kill()

    assert (process.pid, process.alive) == (0, False)


@pytest.mark.parametrize("other", ["started", "boot"])
def test_a_recycled_pid_is_never_signalled(process: Process, tmp_path: Path, other: str) -> None:
    """A process that began at another moment, or after another boot, is not the one in the pid file."""
    sh(process, "exec sleep 60")
    file = tmp_path / "sleeper" / "pid"
    life = file.read_text()
    pid = process.pid
    wrong = life.replace('"started":', '"started":1') if other == "started" else life.replace('"boot":"', '"boot":"x')
    file.write_text(wrong)

    process.tell(signal.SIGKILL)
    process.kill()
    process.pause()

    assert (process.alive, process.paused, process.pid) == (False, False, 0)
    file.write_text(life)
    assert (process.alive, process.paused, process.pid) == (True, False, pid)


@pytest.mark.parametrize("content", ["", "nonsense", "{}", '{"pid":1}'])
def test_a_broken_pid_file_is_no_process(process: Process, tmp_path: Path, content: str) -> None:
    """Rather leave one running than signal the wrong one."""
    (tmp_path / "sleeper").mkdir()
    (tmp_path / "sleeper" / "pid").write_text(content)

    assert (process.pid, process.alive, process.paused) == (0, False, False)


def test_one_that_ended_by_itself_is_not_alive(process: Process) -> None:
    """Nor are zombies, which it is until somebody asks."""
    sh(process, "exit 3")

    assert process.wait(PATIENCE_S)
    assert not process.alive


def test_killing_reaches_those_it_started(process: Process) -> None:
    """HAProxy's workers are its children."""
    sh(process, "sleep 60 & echo $!; wait")
    child = int(said(process))

    process.kill()

    assert not process.alive
    assert wait_until(lambda: state_of(child) in ("", "Z", "X"), PATIENCE_S)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_paused_process_is_alive_and_goes_on(process: Process) -> None:
    """With those it started."""
    sh(process, "sleep 60 & echo $!; wait")
    child = int(said(process))

    process.pause()
    assert (process.alive, process.paused) == (True, True)
    assert wait_until(lambda: state_of(child) == "T", PATIENCE_S)
    process.resume()

    assert wait_until(lambda: not process.paused, PATIENCE_S)
    assert wait_until(lambda: state_of(child) == "S", PATIENCE_S)


def test_it_runs_once(process: Process) -> None:
    """Starting it again while it runs is an error; afterwards it has a new pid, and its log goes on."""
    sh(process, "echo one; exec sleep 60")
    first = process.pid
    said(process)

    with pytest.raises(ClusterError, match="sleeper runs already"):
        sh(process, "exec sleep 60")
    process.kill()
    sh(process, "echo two; exec sleep 60")

    assert process.pid not in (0, first)
    assert wait_until(lambda: process.log.read_text() == "one\ntwo\n", PATIENCE_S)


def test_a_program_that_cannot_be_started(process: Process) -> None:
    """It says which process, and what the system says."""
    with pytest.raises(ClusterError, match=r"sleeper cannot be started: .*No such file or directory: '/no/program'"):
        process.launch(["/no/program"])

    assert not process.alive


def test_waiting_for_one_that_ends_shows_the_end_of_its_log(process: Process) -> None:
    """Fifteen lines of it."""
    sh(process, "for number in $(seq 20); do echo line $number; done; exit 1")

    with pytest.raises(ClusterError) as failed:
        process.expect(lambda: False, PATIENCE_S, "serving")

    lines = str(failed.value).splitlines()
    assert lines[0] == "sleeper ended before it was serving. The end of its log:"
    assert lines[1:] == [f"  line {number}" for number in range(6, 21)]


def test_waiting_for_one_that_takes_too_long(process: Process) -> None:
    """It says for how long; one that becomes what it shall be raises nothing."""
    sh(process, "exec sleep 60")

    process.expect(lambda: True, 0)
    with pytest.raises(ClusterError) as failed:
        process.expect(lambda: False, 0.05)

    assert str(failed.value) == "sleeper was not ready after 0.05 s. Its log is empty."


def test_stopping_several(tmp_path: Path) -> None:
    """Those that do not listen are killed, and named; paused ones hear; what does not run is no obstacle."""
    polite, deaf, paused, absent = (Process(tmp_path, name, "") for name in ("polite", "deaf", "paused", "absent"))
    sh(polite, "echo up; exec sleep 60")
    sh(deaf, "trap '' TERM; echo up; sleep 60 & wait; sleep 60")
    sh(paused, "echo up; exec sleep 60")
    for process in (polite, deaf, paused):
        said(process)
    paused.pause()

    late = stop([polite, deaf, paused, absent], signal.SIGTERM, 0.5)

    assert late == ["deaf"]
    assert not any(process.alive for process in (polite, deaf, paused, absent))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Nothing else stays behind."""
    path = tmp_path / "file"

    write_atomically(path, b"one")
    write_atomically(path, b"two")

    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
