"""The state file and the lock of a state directory."""

import threading
from pathlib import Path

import msgspec
import pytest

from cluster.errors import ClusterError, Refused
from cluster.state import NodeState, State, StateFile

STATE = State(
    store="cluster",
    settings={"poll_timeout": "5"},
    public=1,
    tcp=2,
    example=3,
    stores=(4, 5),
    bus_ports=(6, 7),
    sentinels=(8,),
    nodes=(NodeState("node1", 9, 10), NodeState("node3", 11, 12)),
    names=3,
    made=("/a/b", "/a"),
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """By another object too, and nothing else is in the directory."""
    StateFile(tmp_path).write(STATE)

    assert StateFile(tmp_path).read() == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_reading_follows_what_others_write(tmp_path: Path) -> None:
    """An unchanged file is not read again; a changed one is."""
    file, other = StateFile(tmp_path), StateFile(tmp_path)
    file.write(STATE)
    first = other.read()

    assert other.read() is first
    file.write(msgspec.structs.replace(STATE, names=4))
    assert other.read().names == 4
    file.remove()
    with pytest.raises(Refused):
        other.read()


@pytest.mark.parametrize("under", [".", "missing", "file"])
def test_where_no_cluster_is(tmp_path: Path, under: str) -> None:
    """An empty directory, none at all, a file: the sentence is the same."""
    (tmp_path / "file").touch()
    file = StateFile(tmp_path / under)

    assert not file.exists
    with pytest.raises(Refused, match=r"^no cluster is in "):
        file.read()


def test_a_file_that_makes_no_sense(tmp_path: Path) -> None:
    """It is an error with its path, not a missing cluster."""
    (tmp_path / "state.json").write_text('{"store": "floppy"}')

    with pytest.raises(ClusterError, match=r"state\.json cannot be understood: ") as failed:
        StateFile(tmp_path).read()
    assert not isinstance(failed.value, Refused)


def test_all_ports_are_known() -> None:
    """Each worker of a node has one for its admin listener."""
    assert STATE.ports == set(range(1, 13))
    assert msgspec.structs.replace(STATE, settings={"workers": "3"}).ports == set(range(1, 15))


def test_one_command_at_a_time(tmp_path: Path) -> None:
    """The second one waits until the first one is done."""
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        with StateFile(tmp_path).locked():
            order.append("second")

    thread = threading.Thread(target=second)
    with StateFile(tmp_path).locked():
        thread.start()
        waiting.wait()
        thread.join(0.2)
        order.append("first")
    thread.join()

    assert order == ["first", "second"]


def test_waiting_for_another_command_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says who is in the way."""
    monkeypatch.setattr("cluster.state.LOCK_S", 0.1)

    with (
        StateFile(tmp_path).locked(),
        pytest.raises(ClusterError, match=r"another command has been at work in .* for 0\.1 s"),
        StateFile(tmp_path).locked(),
    ):
        raise AssertionError("two commands at once")


def test_the_lock_is_that_of_the_directory_which_is_there(tmp_path: Path) -> None:
    """A directory that was removed and made again meanwhile is another one; one that is not there has no lock."""
    directory = tmp_path / "state"
    directory.mkdir()
    with StateFile(directory).locked():
        directory.rmdir()
        with pytest.raises(Refused, match="no cluster is in"), StateFile(directory).locked():
            raise AssertionError("locked what is not there")
        directory.mkdir()
        with StateFile(directory).locked():
            assert directory.exists()


def test_what_fails_under_the_lock_is_not_hidden(tmp_path: Path) -> None:
    """Errors of the file system too; and the lock is free again."""
    for error in (FileNotFoundError("gone"), BlockingIOError("blocked")):
        with pytest.raises(OSError, match=r"gone|blocked"), StateFile(tmp_path).locked():
            raise error
