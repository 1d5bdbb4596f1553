"""Shell completion: scripts for bash, zsh and fish, made from the parser of the command line. They start no Python."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

FILE: Final = "FILE"
"""The metavar of what is the name of a file."""


class Option(NamedTuple):
    """One flag. `shown` stands for its value, or is empty if it takes none; `words` are values to offer."""

    names: tuple[str, ...]
    help: str
    shown: str
    words: tuple[str, ...]
    optional: bool
    """Whether the value may be left out."""


class Command(NamedTuple):
    """One command with its flags, and the words to offer where it takes no flag."""

    name: str
    help: str
    options: Sequence[Option]
    words: Sequence[str]


def make_script(shell: str, parser: argparse.ArgumentParser, values: Mapping[str, Sequence[str]]) -> str:
    """The script for one of SHELLS. `values` are words to offer as values of flags whose parser has none, by `dest`."""
    return SHELLS[shell](parser.prog, _options(parser, values), _commands(parser, values))


def _commands(parser: argparse.ArgumentParser, values: Mapping[str, Sequence[str]]) -> Sequence[Command]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._get_subactions()}
            for name, sub in action.choices.items():
                words = [str(word) for one in sub._actions if not one.option_strings for word in one.choices or ()]
                found.append(Command(name, _plain(helps.get(name)), _options(sub, values), words))
    return found


def _options(parser: argparse.ArgumentParser, values: Mapping[str, Sequence[str]]) -> Sequence[Option]:
    return [
        Option(
            tuple(action.option_strings),
            _plain(action.help),
            "" if action.nargs == 0 else str(action.metavar or action.dest.upper()),
            tuple(str(word) for word in action.choices or values.get(action.dest, ())),
            action.nargs == "?",
        )
        for action in parser._actions
        if action.option_strings
    ]


def _plain(help: str | None) -> str:
    """A help as it is shown, without the default in brackets and what follows a semicolon."""
    return re.sub(r" \[[^\]]*\]$", "", (help or "").replace("%%", "%")).partition("; ")[0]


_BASH: Final = """\
# bash completion: put `source <(@PROGRAM completion bash)` into ~/.bashrc
_@PROGRAM() {
    local IFS=$' \\t\\n' current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} kind= flags= words=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '@FIRST' -- "$current"))
        return
    fi
    # bash takes --flag=value for three words.
    if [[ $current == = ]]; then
        current=
    elif [[ $previous == = ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case ${COMP_WORDS[1]} in
@FLAGS
    esac
    case ${COMP_WORDS[1]}:$previous in
@VALUES
    esac
    case $kind in
        any) return ;;
        word) flags= ;;
        file)
            IFS=$'\\n'
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "$current"))
            return
            ;;
    esac
    if [[ $current == -* ]]; then
        words=$flags
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -F _@PROGRAM @PROGRAM
"""


def _bash(program: str, general: Sequence[Option], commands: Sequence[Command]) -> str:
    flags, values = [], []
    for command in commands:
        names = " ".join(name for option in command.options for name in option.names)
        flags.append(f"        {command.name}) flags='{names}' words='{' '.join(command.words)}' ;;")
        kinds: dict[str, list[str]] = {}
        for option in command.options:
            if option.shown:
                kind = "" if option.optional else "word" if option.words else "file" if option.shown == FILE else "any"
                answer = f"kind={kind} words='{' '.join(option.words)}'"
                kinds.setdefault(answer, []).extend(f"{command.name}:{name}" for name in option.names)
        values += [f"        {' | '.join(patterns)}) {answer} ;;" for answer, patterns in kinds.items()]
    first = [*(command.name for command in commands), *(name for option in general for name in option.names)]
    return _fill(_BASH, PROGRAM=program, FIRST=" ".join(first), FLAGS="\n".join(flags), VALUES="\n".join(values))


_ZSH: Final = """\
#compdef @PROGRAM
# zsh completion: put `source <(@PROGRAM completion zsh)` into ~/.zshrc, behind compinit
_@PROGRAM() {
    local curcontext=$curcontext state line
    local -a commands=(
@COMMANDS
    )
    _arguments -C \\
@GENERAL
        '1: :->command' \\
        '*:: :->arguments'
    case $state in
        command) _describe command commands ;;
        arguments)
            case $words[1] in
@ARGUMENTS
            esac
            ;;
    esac
}
if [[ $funcstack[1] == _@PROGRAM ]]; then
    _@PROGRAM "$@"
else
    compdef _@PROGRAM @PROGRAM
fi
"""


def _zsh(program: str, general: Sequence[Option], commands: Sequence[Command]) -> str:
    def spec(option: Option) -> str:
        several = len(option.names) > 1
        text = f"'({' '.join(option.names)})'{{{','.join(option.names)}}}'" if several else f"'{option.names[0]}"
        text += f"{'=' if option.shown else ''}[{_escape(option.help, '[]:')}]"
        if option.shown:
            action = f"({' '.join(option.words)})" if option.words else "_files" if option.shown == FILE else " "
            text += f"{'::' if option.optional else ':'}{_escape(option.shown, ':')}:{action}"
        return f"{text}'"

    arguments = []
    for command in commands:
        # The guard keeps the message that there is nothing to offer away from words that begin a flag.
        rest = f"'*: :({' '.join(command.words)})'" if command.words else "'*: :_guard \"[^-]*\" argument'"
        specs = " \\\n".join(f"                    {text}" for text in [*map(spec, command.options), rest])
        arguments.append(
            f"                {command.name})\n                    _arguments \\\n{specs}\n                    ;;"
        )
    return _fill(
        _ZSH,
        PROGRAM=program,
        COMMANDS="\n".join(f"        '{one.name}:{_escape(one.help, ':')}'" for one in commands),
        GENERAL="\n".join(f"        {spec(option)} \\" for option in general),
        ARGUMENTS="\n".join(arguments),
    )


def _fish(program: str, general: Sequence[Option], commands: Sequence[Command]) -> str:
    def line(condition: str, *words: str) -> str:
        return " ".join(["complete", "-c", program, "-n", condition, *words])

    def option_line(condition: str, option: Option) -> str:
        names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
        value = []
        if option.shown and not option.optional:
            value = ["-r", "-F"] if option.shown == FILE and not option.words else ["-x"]
        if option.words and not option.optional:
            value += ["-a", f"'{' '.join(option.words)}'"]
        return line(condition, *names, *value, "-d", f"'{_escape(option.help, '')}'")

    first = "__fish_use_subcommand"
    lines = [f"# fish completion: `{program} completion fish > ~/.config/fish/completions/{program}.fish`"]
    lines.append(f"complete -c {program} -f")
    lines += [option_line(first, option) for option in general]
    for command in commands:
        lines.append(line(first, "-a", command.name, "-d", f"'{_escape(command.help, '')}'"))
    for command in commands:
        condition = f"'__fish_seen_subcommand_from {command.name}'"
        lines += [option_line(condition, option) for option in command.options]
        if command.words:
            lines.append(line(condition, "-a", f"'{' '.join(command.words)}'"))
    return "\n".join(lines) + "\n"


def _escape(text: str, marks: str) -> str:
    """For single quotes, with a backslash before each of the marks."""
    escaped = "".join(f"\\{char}" if char in marks else char for char in text)
    return escaped.replace("'", "’")


def _fill(template: str, **parts: str) -> str:
    return re.sub("@([A-Z]+)", lambda match: parts[match[1]], template)


SHELLS: Final[Mapping[str, Callable[[str, Sequence[Option], Sequence[Command]], str]]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
