"""`python -m cluster up | scale | status | drain | kill | down`."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, get_args

from cluster.errors import ClusterError
from cluster.operate import Cluster
from cluster.state import Kind

STATE: Final = Path(".state/cluster")
TABLE: Final = ("name", "state", "pid", "address", "admin", "haproxy", "parked", "channels")

EPILOG: Final = f"""\
The exit status is 0; 1 if a part failed, or `status` found one that is not well; 2 if the command could not be begun.
Everything a cluster has is in its state directory, [{STATE}]. Settings of nodes: `python -m pushup serve --help`.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--state", type=Path, default=STATE, metavar="DIRECTORY", help=f"the cluster's own [{STATE}]")
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description="Run many PushUp nodes on this machine, with Redis and HAProxy from its Debian packages.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        description = f"{help[0].upper()}{help[1:]}."
        return commands.add_parser(name, parents=[shared], help=help, description=description, allow_abbrev=False)

    up = add("up", "start a cluster, and say how to use it")
    up.add_argument("--nodes", type=int, default=4, metavar="N", help="how many nodes [4]")
    up.add_argument("--store", choices=get_args(Kind), default="standalone", help="what kind of Redis [standalone]")
    up.add_argument("--port", type=int, default=0, metavar="PORT", help="of HAProxy's HTTP frontend [a free one]")
    up.add_argument("--example", action="store_true", help="also the example web application, behind HAProxy")
    up.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the nodes; may be repeated"
    )
    add("scale", "have so many nodes: start new ones or drain the newest").add_argument("nodes", type=int, metavar="N")
    add("status", "show every process").add_argument("--json", action="store_true", help="for programs")
    add("drain", "let a node answer its polls over its drain window, and end").add_argument("node", metavar="NODE")
    add("kill", "kill a node, to see what happens").add_argument("node", metavar="NODE")
    add("down", "stop everything and remove what was made").add_argument(
        "--keep-logs", action="store_true", help="leave the logs where they are"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    # A command that is asked to end stops what it has started, as it does for Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if given.command == "up":
            settings = _settings(parser, given.set)
            cluster = Cluster.up(
                given.state,
                nodes=given.nodes,
                store=given.store,
                example=given.example,
                settings=settings,
                port=given.port,
            )
            print(welcome(cluster, given.state))
            return 0
        cluster = Cluster.at(given.state)
        if given.command == "scale":
            cluster.scale(given.nodes)
            print(f"nodes: {', '.join(node.name for node in cluster.nodes)}")
        elif given.command == "status":
            status = cluster.status()
            print(json.dumps(status, indent=2) if given.json else table(status))
            return 0 if status["whole"] else 1
        elif given.command == "drain":
            cluster.drain(given.node)
            print(f"{given.node} has ended; nodes: {', '.join(node.name for node in cluster.nodes) or 'none'}")
        elif given.command == "kill":
            cluster.kill(given.node)
            print(f"{given.node} is dead; `{_command(f'scale {len(cluster.nodes)}', given.state)}` replaces it")
        else:
            cluster.down(keep_logs=given.keep_logs)
            print("everything has stopped")
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("cluster: interrupted", file=sys.stderr)
        return 130
    return 0


def _settings(parser: argparse.ArgumentParser, given: Sequence[str]) -> Mapping[str, str]:
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            parser.error(f"--set {text}: it must be NAME=VALUE")
        settings[name.strip().replace("-", "_")] = value
    return settings


def welcome(cluster: Cluster, state: Path) -> str:
    """What a person needs to know of a cluster that has just been started."""
    count = len(cluster.nodes)
    example = ", and the example web application: open it in two windows" if cluster.example else ""
    lines = [
        f"{count} node{'s' if count > 1 else ''}, Redis {cluster.store}, HAProxy; state and logs in {state}",
        "",
        f"  for browsers    http://{cluster.public}    /poll, /events, /stream, /ws of the nodes{example}",
        f"  for back ends   http://{cluster.tcp}    the nodes' whole API, in turns",
        f"  for publishers  {cluster.broker}",
        *[f"  {node.name:15} http://{node.address}    admin http://{node.admin_address}" for node in cluster.nodes],
        "",
        "Try next:",
        f"  curl 'http://{cluster.public}/poll?channel=news&timeout=60'",
        f"  curl http://{cluster.tcp}/publish -d " + """'{"channels":["news"],"data":{"headline":"It works"}}'""",
        *[f"  {_command(command, state)}" for command in ("status", f"scale {count + 1}", "drain node1", "down")],
    ]
    return "\n".join(lines)


def table(status: Mapping[str, Any]) -> str:
    """The status as text for people: a head, and a line for each process."""
    rows = [dict(zip(TABLE, [name.upper() for name in TABLE], strict=True))]
    for process in status["processes"]:
        row = {**process, "admin": process.get("admin_address"), "pid": process["pid"] or None}
        rows.append({name: "-" if row.get(name) is None else str(row[name]) for name in TABLE})
    widths = [max(len(row[name]) for row in rows) for name in TABLE]
    lines = ["  ".join(f"{row[name]:{width}}" for name, width in zip(TABLE, widths, strict=True)) for row in rows]
    head = [
        f"for browsers    http://{status['public']}",
        f"for back ends   http://{status['tcp']}",
        f"for publishers  {status['broker']}",
        "",
    ]
    return "\n".join([*head, *[line.rstrip() for line in lines]])


def _command(command: str, state: Path) -> str:
    """A command of this program as it can be typed here."""
    python = sys.executable
    if Path(python).is_relative_to(Path.cwd()):
        python = os.path.relpath(python)
    parts = [python, "-m", "cluster", *command.split()]
    return shlex.join(parts if state == STATE else [*parts, "--state", str(state)])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
