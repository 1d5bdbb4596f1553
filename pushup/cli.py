"""The command `pushup`."""

import argparse
import asyncio
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec

from pushup.access import hash_key, make_key
from pushup.address import parse_address
from pushup.errors import PushUpError, SettingsError
from pushup.logs import configure
from pushup.nodes import fetch_nodes, show_nodes
from pushup.server import Server, serve
from pushup.settings import ENV_PREFIX, FIELDS, Loaded, Settings, load, show
from pushup.version import __version__
from pushup.workers import Workers

EXIT_WRONG_SETTING: Final = 2

GROUPS: Final = {
    "addresses and broker": ("listen", "admin_listen", "broker", "realm", "name", "workers", "demo", "nchan"),
    "access": (
        "access",
        "insecure",
        "tls_certificate",
        "tls_key",
        "cors_origins",
        "trusted_proxies",
        "proxy_protocol",
    ),
    "polls": (
        "poll_timeout",
        "poll_timeout_max",
        "heartbeat",
        "poll_jitter",
        "polls_per_token_max",
        "poll_channels_max",
        "answer_bytes_max",
    ),
    "publications": (
        "message_bytes_max",
        "publish_channels_max",
        "publish_batch_max",
        "publish_rate_max",
        "token_publish_rate_max",
        "idempotency_window",
    ),
    "channels": ("channel_ttl", "channel_window", "channel_max_messages", "channel_implicit", "realm_bytes_max"),
    "this node": (
        "backlog_messages",
        "linger",
        "connections_per_address_max",
        "head_bytes_max",
        "body_bytes_max",
        "write_buffer_bytes_max",
        "unread_bytes_max",
        "request_timeout",
        "write_timeout",
        "keepalive_timeout",
        "broker_timeout",
        "drain_window",
    ),
    "logs": ("log_level", "log_format"),
}

EPILOG: Final = f"""\
Defaults are in brackets. Every setting can be given in three ways; the first of them wins:

  a flag                    --poll-timeout 30
  an environment variable   {ENV_PREFIX}POLL_TIMEOUT=30
  a TOML file               poll_timeout = 30

The file is named by --config or {ENV_PREFIX}CONFIG. `pushup config`, with the same flags, prints the settings in force
and where each comes from. A wrong setting is named in a sentence, and the exit status is {EXIT_WRONG_SETTING}.
"""

LARGE_BLOCK_BYTES: Final = 128 * 1024
_M_MMAP_THRESHOLD: Final = -3

HELP_COLUMN: Final = 44
"""Where the descriptions begin: beside the longest flag."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its flags are made from the settings."""
    parser = argparse.ArgumentParser(
        prog="pushup",
        description="A long-polling push server.",
        epilog="Try it: `pushup serve --demo`, then open http://127.0.0.1:8080 in two browsers.",
    )
    parser.add_argument("--version", action="version", version=f"pushup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    key = commands.add_parser(
        "key",
        help="make a key for a publisher",
        description="Make a key, shown once on stderr. The lines for the access file, with its hash, go to stdout.",
    )
    key.add_argument("name", nargs="?", default="backend", help="what to call it in the access file [backend]")
    for command, help, description in (
        (
            "serve",
            "run a node; `pushup serve --help` lists every setting",
            "Run a node until SIGTERM (parked polls are answered over --drain-window) or Ctrl-C (at once).",
        ),
        (
            "config",
            "print the settings in force and where each comes from",
            "Print the settings in force as a TOML file, with where each comes from. Passwords are left out.",
        ),
        (
            "nodes",
            "list the nodes of the realm with their load",
            "List the nodes of the realm that were heard of in the last minute. Asks the --broker; with memory://, "
            "which has one node, that node at --admin-listen.",
        ),
    ):
        sub = commands.add_parser(
            command,
            help=help,
            usage=f"pushup {command} [--config FILE] [--SETTING VALUE]...",
            description=description,
            epilog=EPILOG,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=HELP_COLUMN),
            allow_abbrev=False,
        )
        sub.add_argument("--config", metavar="FILE", help="a TOML file with settings")
        if command == "nodes":
            sub.add_argument("--json", action="store_true", help="JSON instead of a table")
        _add_settings(sub)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            field = FIELDS[name]
            help = f"{field.description} [{show(name, field.default) or 'none'}]".replace("%", "%%")
            if isinstance(field.default, bool):
                group.add_argument(field.flag, dest=name, nargs="?", const="true", metavar=field.shown, help=help)
            else:
                group.add_argument(field.flag, dest=name, metavar=field.shown, help=help)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parsed = vars(make_parser().parse_args(arguments))
    if parsed["command"] == "key":
        print_key(parsed["name"])
        return 0
    flags = {name: parsed[name] for name in FIELDS if parsed[name] is not None}
    file = parsed["config"] or os.environ.get(f"{ENV_PREFIX}CONFIG")
    try:
        loaded = load(flags, os.environ, Path(file) if file else None)
        settings = loaded.settings
        if parsed["command"] == "config":
            print_settings(loaded)
            return 0
        configure(settings.log_level, settings.log_format)
        if parsed["command"] == "nodes":
            print_nodes(settings, as_json=parsed["json"])
        elif settings.workers > 1:
            workers = Workers(settings, serve_as_worker)
            return workers.run(partial(announce_workers, settings, workers.address))
        else:
            _run(settings, announce)
    except PushUpError as error:
        return _complain(error)
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 1
    return 0


def serve_as_worker(settings: Settings, ready: "Connection[Any, Any]") -> None:
    """One of several processes on a port. Whoever minds it hears the admin address once it serves."""
    configure(settings.log_level, settings.log_format)
    # Ctrl-C in a terminal goes to the process that minds this one, which passes it on.
    os.setsid()
    try:
        _run(settings, lambda server: ready.send(server.admin_address), shares_port=True)
    except PushUpError as error:
        sys.exit(_complain(error))
    except asyncio.CancelledError:
        sys.exit(1)


def _complain(error: PushUpError) -> int:
    print(f"pushup: {error}", file=sys.stderr)
    return EXIT_WRONG_SETTING if isinstance(error, SettingsError) else 1


def _run(settings: Settings, announce: Callable[[Server], None], *, shares_port: bool = False) -> None:
    import uvloop

    # What is loaded by now stays; a parked poll makes no garbage that only the collector would find.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    _keep_large_blocks_apart()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, announce, shares_port=shares_port))


def _keep_large_blocks_apart() -> None:
    """Have large buffers go back to the system when they are freed. Else glibc keeps them once it has seen a few."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def announce(server: Server) -> None:
    """Say where it listens, on which broker, and who may use it."""
    _announce(server.settings, server.address, server.admin_address)


def announce_workers(settings: Settings, address: str, admin_addresses: Sequence[str]) -> None:
    """The same for several processes on one port."""
    _announce(settings, address, ", http://".join(admin_addresses))


def _announce(settings: Settings, address: str, admin_address: str) -> None:
    notes = [f"{settings.workers} processes"] if settings.workers > 1 else []
    notes += ["demo: open it in a browser"] if settings.demo else []
    beyond = "" if parse_address(settings.listen).loopback else ", from anywhere"
    access = settings.access or f"open: whoever reaches the port may publish and poll{beyond}"
    scheme = "https" if settings.tls_certificate else "http"
    lines = [
        f"PushUp {__version__}",
        f"  polls and publications  {scheme}://{address}" + (f"  ({', '.join(notes)})" if notes else ""),
        f"  health and metrics      http://{admin_address}",
        f"  broker                  {show('broker', settings.broker)}",
        f"  access                  {access}",
    ]
    print("\n".join(lines), flush=True)


def print_key(name: str) -> None:
    """A new key on the terminal (stderr), and what the access file is to say of it on stdout."""
    key = make_key()
    print(f"the key, which is shown this once: {key}", file=sys.stderr)
    print(f"[[realms.default.keys]]\nname = {json.dumps(name)}\nhash = {json.dumps(hash_key(key))}")
    print('actions = ["publish", "manage"]\nchannels = ["*"]')


def print_nodes(settings: Settings, *, as_json: bool) -> None:
    """The nodes of the realm, as a table or as JSON."""
    nodes, now = asyncio.run(fetch_nodes(settings))
    if as_json:
        print(json.dumps({"nodes": msgspec.to_builtins(nodes)}, indent=2))
    else:
        print(show_nodes(nodes, now))


def print_settings(loaded: Loaded) -> None:
    """The settings as TOML, one line for each, with its origin as a comment."""
    lines = [(f"{name} = {_toml(name, getattr(loaded.settings, name))}", loaded.origins[name]) for name in FIELDS]
    width = max(len(line) for line, _ in lines)
    print("\n".join(f"{line:{width}}  # {origin}" for line, origin in lines))


def _toml(name: str, value: Any) -> str:
    text = show(name, value)
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) else text
