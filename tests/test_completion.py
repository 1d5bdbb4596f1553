"""Shell completion: what each shell offers with the script loaded, and that no script falls behind the parser."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pushup.cli import main, make_parser
from pushup.completion import SHELLS, make_script
from tests.support import PATIENCE_S

COMMANDS = ["serve", "config", "nodes", "key", "publish", "listen", "channels", "bench", "completion"]
PROMPT = "ready> "


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """What bash offers for a line, whose last word is being typed. `--a=b` is three words to it."""
    (tmp_path / "script").write_text(script("bash", capsys))

    def complete(line: str) -> list[str]:
        words = re.findall(r"=|[^ =]+", line) + ([""] if line.endswith(" ") else [])
        asked = (
            f'source ./script; COMP_WORDS=("$@"); COMP_CWORD={len(words) - 1}; _pushup; '
            'for word in "${COMPREPLY[@]}"; do echo "$word"; done'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", asked, "bash", *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    return complete


@pytest.fixture
def fish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """What fish offers for a line, without the descriptions."""
    (tmp_path / "script").write_text(script("fish", capsys))
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def complete(line: str) -> list[str]:
        done = subprocess.run(
            ["fish", "--no-config", "-c", "source ./script; complete -C $argv[1]", line],
            cwd=tmp_path,
            env=home,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return [offered.partition("\t")[0] for offered in done.stdout.splitlines()]

    return complete


CASES = [
    ("pushup ", COMMANDS),
    ("pushup ser", ["serve"]),
    ("pushup completion ", ["bash", "fish", "zsh"]),
    ("pushup serve --log-", ["--log-format", "--log-level"]),
    ("pushup serve --log-level ", ["debug", "error", "info", "warning"]),
    ("pushup serve --log-level=de", ["debug"]),
    ("pushup publish news --te", ["--text"]),
    ("pushup bench --url http://a --con", ["--confirm"]),
    ("pushup listen --count ", []),
    ("pushup listen ", []),
]


@pytest.mark.parametrize(("line", "offered"), CASES)
def test_bash(bash: Callable[[str], list[str]], line: str, offered: list[str]) -> None:
    """Commands first; then the flags of the command, and the values of those that have some to offer."""
    assert sorted(set(bash(line)) - {"-h", "--help", "-V", "--version"}) == sorted(offered)


def test_bash_and_files(bash: Callable[[str], list[str]], tmp_path: Path) -> None:
    """A flag that names a file is offered files, also those with blanks in their names."""
    (tmp_path / "my access.toml").touch()

    assert bash("pushup serve --access my") == ["my access.toml"]
    assert bash("pushup serve --access=my") == ["my access.toml"]


def test_bash_and_switches(bash: Callable[[str], list[str]]) -> None:
    """A switch may have a value, or be followed by another flag."""
    assert bash("pushup serve --demo ") == ["true", "false"]
    assert "--listen" in bash("pushup serve --demo --")


@needs("fish")
@pytest.mark.parametrize(("line", "offered"), [(line, offered) for line, offered in CASES if "=" not in line])
def test_fish(fish: Callable[[str], list[str]], line: str, offered: list[str]) -> None:
    """The same."""
    assert sorted(fish(line)) == sorted(offered)


@needs("fish")
def test_fish_and_files(fish: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Only where a file is wanted."""
    (tmp_path / "my access.toml").touch()

    assert fish("pushup serve --access my") == ["my access.toml"]
    assert fish("pushup publish my") == []


class Zsh:
    """An interactive zsh on a terminal of its own, with the script loaded."""

    def __init__(self, folder: Path) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execve(
                str(shutil.which("zsh")),
                ["zsh", "-f", "-i"],
                {"TERM": "dumb", "COLUMNS": "300", "PATH": os.environ["PATH"]},
            )
        self.type(
            f"PS1= PS2= RPS1=; unsetopt zle_bracketed_paste 2>/dev/null; bindkey '\\t' complete-word; autoload -U "
            f"compinit; compinit -u -D; source ./script; PS1='{PROMPT[:-1]}'' '\n"
        )
        self.read(PROMPT)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def read(self, pattern: str) -> str:
        """What it shows until it shows this."""
        shown = ""
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(pattern, shown):
            readable, _, _ = select.select([self._terminal], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"zsh shows only {shown!r}"
            shown += os.read(self._terminal, 65536).decode()
        return shown

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._terminal)


@needs("zsh")
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("pushup ser\t", "pushup serve "),
        ("pushup serve --log-l\t", "--log-level="),
        ("pushup serve --log-level deb\t", "--log-level debug "),
        ("pushup serve --log-level=deb\t", "--log-level=debug "),
        ("pushup serve --access acc\t", r"--access access\.toml "),
        ("pushup completion fi\t", "completion fish "),
        ("pushup publish news --te\t", "publish news --text "),
    ],
)
def test_zsh(typed: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tab completes what has one continuation."""
    (tmp_path / "script").write_text(script("zsh", capsys))
    (tmp_path / "access.toml").touch()
    zsh = Zsh(tmp_path)
    try:
        zsh.type(typed)
        zsh.read(shown)
    finally:
        zsh.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_no_flag_is_left_out(shell: str) -> None:
    """Every flag of every command is in the script, as the shell writes it."""
    text = make_script(shell, make_parser(), {})

    commands = next(action for action in make_parser()._actions if action.dest == "command").choices
    assert commands is not None
    assert list(commands) == COMMANDS
    for command in COMMANDS:
        for action in dict(commands)[command]._actions:
            for flag in action.option_strings:
                assert (f"-l {flag[2:]} " if shell == "fish" and flag.startswith("--") else flag[1:]) in text
