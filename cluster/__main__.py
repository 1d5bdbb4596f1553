"""`python -m cluster`: a cluster on this machine, without Docker."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

from cluster import stores
from cluster.operate import Cluster
from cluster.processes import ClusterError, Process

STATE: Final = Path(".state/cluster")

EPILOG: Final = """\
examples:
  python -m cluster up --nodes 4 --example     the question board at the address it prints
  python -m cluster scale 2                    two nodes drain; their clients go to the others
  python -m cluster kill node1                 as if its machine had died
  python -m cluster up --store sentinel        or cluster: other kinds of Redis
  python -m cluster down
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description="Run Redis, several nodes and HAProxy on this machine, from the Debian packages.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--state", type=Path, default=STATE, help=f"the state directory [{STATE}]")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start a cluster")
    up.add_argument("--nodes", type=int, default=2, help="how many [2]")
    up.add_argument("--store", choices=stores.KINDS, default="standalone", help="kind of Redis [standalone]")
    up.add_argument("--port", type=int, default=0, help="of HAProxy's HTTP front [any free one]")
    up.add_argument("--example", action="store_true", help="also start the example web application")
    up.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the nodes")
    scale = commands.add_parser("scale", help="have as many nodes")
    scale.add_argument("count", type=int)
    status = commands.add_parser("status", help="what runs, and what HAProxy thinks of it")
    status.add_argument("--json", action="store_true", help="for programs")
    for command, help in (("drain", "let a node end in good order"), ("kill", "end a node as a power cut would")):
        commands.add_parser(command, help=help).add_argument("node")
    down = commands.add_parser("down", help="end everything")
    down.add_argument("--now", action="store_true", help="without draining")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    given = make_parser().parse_args(arguments)
    try:
        if given.command == "up":
            _up(given)
            return 0
        cluster = Cluster.at(given.state)
        match given.command:
            case "scale":
                cluster.scale(given.count)
            case "drain":
                cluster.drain(given.node)
            case "kill":
                cluster.kill(given.node)
            case "down":
                cluster.down(at_once=given.now)
                return 0
        _show(cluster, as_json=given.command == "status" and given.json)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return 0


def _up(given: argparse.Namespace) -> None:
    settings = {}
    for pair in given.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ClusterError(f"--set {pair}: it is NAME=VALUE")
        settings[name.replace("-", "_")] = value
    cluster = Cluster.up(
        given.state, nodes=given.nodes, store=given.store, example=given.example, settings=settings, port=given.port
    )
    _show(cluster)
    print(
        f"""
  polls            http://{cluster.public}/poll?channel=news{_board(cluster)}
  the whole API    http://{cluster.tcp}
  Redis            {cluster.broker}

Try: curl 'http://{cluster.public}/poll?channel=news&timeout=60'
     curl http://{cluster.tcp}/publish -d '{{"channels":["news"],"data":"hello"}}'"""
    )


def _board(cluster: Cluster) -> str:
    return f"\n  question board   http://{cluster.public}/" if cluster.application else ""


def describe(cluster: Cluster) -> dict[str, Any]:
    """What runs, for programs."""
    states = cluster.proxy_states()
    load = _load(cluster)
    return {
        "public": cluster.public,
        "tcp": cluster.tcp,
        "broker": cluster.broker,
        "application": cluster.application,
        "nodes": [
            {
                "name": node.name,
                "address": node.address,
                "admin_address": node.admin_address,
                "pid": node.pid,
                "alive": node.alive,
                "proxy": states.get(node.name, ""),
                "parked": load.get(node.name, {}).get("parked"),
            }
            for node in cluster.nodes
        ],
        "stores": [{**_about(store), "role": store.role()} for store in cluster.stores],
        "others": [_about(process) for process in (*cluster.sentinels, *cluster.others, cluster.proxy)],
    }


def _about(process: Process) -> dict[str, Any]:
    return {"name": process.name, "address": process.address, "pid": process.pid, "alive": process.alive}


def _load(cluster: Cluster) -> dict[str, Any]:
    for node in cluster.nodes:
        try:
            with urlopen(f"http://{node.admin_address}/nodes", timeout=2.0) as answer:
                return {about["name"]: about for about in json.load(answer)["nodes"]}
        except OSError:
            continue
    return {}


def _show(cluster: Cluster, *, as_json: bool = False) -> None:
    about = describe(cluster)
    if as_json:
        print(json.dumps(about, indent=2))
        return
    print(f"{'NAME':<12} {'ADDRESS':<22} {'PID':>8}  STATE")
    for node in about["nodes"]:
        parked = "" if node["parked"] is None else f", {node['parked']:,} polls parked"
        print(_line(node, f"{node['proxy'] or 'not in HAProxy'}{parked}"))
    for store in about["stores"]:
        print(_line(store, store["role"] or "does not answer"))
    for other in about["others"]:
        print(_line(other, "runs"))


def _line(about: dict[str, Any], state: str) -> str:
    shown = state if about["alive"] else "dead"
    return f"{about['name']:<12} {about['address']:<22} {about['pid']:>8}  {shown}"


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
