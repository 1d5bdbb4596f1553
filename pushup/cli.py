"""The command `pushup`."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin, get_type_hints

from pushup.errors import Forbidden, InvalidRequest, PushUpError, SettingsError, TooMany, Unauthorized, Unavailable
from pushup.settings import ENV_PREFIX, FIELDS, Loaded, Settings, load, show
from pushup.version import __version__

# What only one command needs is imported there: `pushup --help` loads neither the server nor the client.
if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from pushup.server import Server

EXIT_FAILED: Final = 1
EXIT_WRONG_SETTING: Final = 2
EXIT_REFUSED: Final = 3
EXIT_UNAVAILABLE: Final = 4
EXIT_INTERRUPTED: Final = 130
EXIT_READER_GONE: Final = 141

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

STATUSES: Final = f"""\
exit status:
  0    done
  {EXIT_FAILED}    failed
  {EXIT_WRONG_SETTING}    wrong usage, or a wrong setting
  {EXIT_REFUSED}    refused: the token or key is missing, expired, or not good for this
  {EXIT_UNAVAILABLE}    unavailable: no answer, a limit reached, or not in time
  {EXIT_INTERRUPTED}  Ctrl-C ({EXIT_READER_GONE}: whoever read the output is gone)
"""

CLIENT_EPILOG: Final = f"""\
The service is named by --url or the variable PUSH_URL. Its key or token, if it wants one, is read from --token-file or
the variable PUSH_TOKEN; with --token other users of this machine could see it. (What begins with {ENV_PREFIX} is a
setting of a node.) Only results go to standard output; everything else is a sentence on standard error.

{STATUSES}"""

EXAMPLES: Final = {
    "publish": """\
examples:
  pushup publish news '{"headline": "It works"}'
  pushup publish news,sports --text 'It works' --key greeting-1
  tail -f app.log | pushup publish logs --lines --text
""",
    "listen": """\
examples:
  pushup listen news sports
  pushup listen orders --cursor-file orders.cursor >> orders.jsonl      goes on where it was, whatever stopped it
  pushup listen news --count 1 --for 10                                 one message, or status 4 after 10 s
""",
    "channels": "",
    "bench": """\
examples:
  pushup bench --pollers 500 --rate 100 --for 30
  pushup bench --url https://push.example.com --confirm push.example.com --token-file key

Latencies are counted from the moment a publication was due. It works on channels of its own, named bench.RANDOM.N,
which it closes afterwards if its key may. The status is 1 if a message was lost, repeated or refused.
""",
}

LARGE_BLOCK_BYTES: Final = 128 * 1024
_M_MMAP_THRESHOLD: Final = -3

WIDTH: Final = 118
HELP_COLUMN: Final = 44
"""Where the descriptions begin: beside the longest flag."""


class _Parser(argparse.ArgumentParser):
    """Takes flags between positional arguments, too: a command like any other."""

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixing:
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its flags are made from the settings."""
    parser = argparse.ArgumentParser(
        prog="pushup",
        description="A long-polling push server, and clients for it.",
        epilog=f"Try it: `pushup serve --demo`, then open http://127.0.0.1:8080 in two browsers.\n\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"pushup {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", parser_class=_Parser
    )
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
    key = commands.add_parser(
        "key",
        help="make a key for a publisher",
        description="Make a key, shown once on stderr. The lines for the access file, with its hash, go to stdout.",
    )
    key.add_argument("name", nargs="?", default="backend", help="what to call it in the access file [backend]")
    _add_publish(commands)
    _add_listen(commands)
    _add_channels(commands)
    _add_bench(commands)
    completion = commands.add_parser(
        "completion",
        help="print a script that completes command lines, for bash, zsh or fish",
        description="Print a script for a shell; its first lines say where to put it.",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish", metavar="SHELL")
    return parser


def _add_client(commands: Any, name: str, usage: str, help: str, description: str) -> argparse.ArgumentParser:
    """A command of a client, with the flags that name the service."""
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        usage=f"pushup {name} {usage}",
        description=fill(description, WIDTH),
        epilog=f"{EXAMPLES[name]}\n{CLIENT_EPILOG}".lstrip(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=HELP_COLUMN),
        allow_abbrev=False,
    )
    group = sub.add_argument_group("the service")
    group.add_argument("--url", metavar="URL", help="where it is [PUSH_URL, or http://127.0.0.1:8080]")
    group.add_argument("--realm", metavar="NAME", help="a realm other than the one at the root")
    group.add_argument("--token-file", metavar="FILE", help="a file with the key or token, read again when it expires")
    group.add_argument("--token", metavar="TOKEN", help="the key or token itself [PUSH_TOKEN]")
    return sub


def _add_publish(commands: Any) -> None:
    sub = _add_client(
        commands,
        "publish",
        "[FLAG]... CHANNEL[,CHANNEL]... [DATA]",
        "publish a message, or each line of the input",
        "Publish DATA, which is JSON, to one or more channels, and print the message's id. A comma in a name is \\,.",
    )
    sub.add_argument("channels", metavar="CHANNEL[,CHANNEL]...", help="where to publish")
    sub.add_argument("data", nargs="?", metavar="DATA", help="JSON; - reads it from standard input")
    sub.add_argument("--text", action="store_true", help="DATA is a string, not JSON")
    sub.add_argument("--lines", action="store_true", help="publish each line of standard input, as they come")
    sub.add_argument(
        "--key", metavar="KEY", help="publish it once, however often this is repeated; lines get KEY-1, ..."
    )
    sub.add_argument("--broker", metavar="URL", help="publish straight into this Redis, past the service")
    sub.add_argument("--json", action="store_true", help="print JSON: the id, and whether it was a repetition")


def _add_listen(commands: Any) -> None:
    sub = _add_client(
        commands,
        "listen",
        "[FLAG]... CHANNEL...",
        "print the messages of channels as they come",
        "Print messages as lines of JSON, each once and in order, through breaks of the connection and restarts of "
        "nodes. Gaps, closed channels and new tries are told on standard error.",
    )
    sub.add_argument("channels", nargs="+", metavar="CHANNEL", help="what to follow")
    sub.add_argument("--start", default="latest", metavar="CURSOR", help="an id, 0 for all that is cached, or [latest]")
    sub.add_argument("--cursor-file", metavar="FILE", help="begin at the cursor it holds, and keep it there")
    sub.add_argument("--count", type=_count, metavar="N", help="end after N messages")
    sub.add_argument("--for", dest="seconds", type=_positive, metavar="SECONDS", help="end after this time")
    sub.add_argument("--data", action="store_true", help="print only the data of each message")
    sub.add_argument("--json", action="store_true", help="notices on standard error are JSON, too")


def _add_channels(commands: Any) -> None:
    sub = _add_client(commands, "channels", "[FLAG]...", "list the channels", "List the channels of a realm by name.")
    sub.add_argument("--json", action="store_true", help="JSON instead of a table")


def _add_bench(commands: Any) -> None:
    sub = _add_client(
        commands,
        "bench",
        "[FLAG]...",
        "put a running service under load, and measure",
        "Poll and publish, count everything that comes, and show how long it took. On a host other than this machine "
        "only if --confirm names it once more: a load test takes from others what they use.",
    )
    sub.add_argument("--pollers", type=_count, default=100, metavar="N", help="clients that poll [100]")
    sub.add_argument("--channels", type=_count, default=10, metavar="N", help="channels they share [10]")
    sub.add_argument("--rate", type=_positive, default=50.0, metavar="N", help="publications a second, in all [50]")
    sub.add_argument("--size", type=_count, default=100, metavar="BYTES", help="data of each publication [100]")
    sub.add_argument("--for", dest="seconds", type=_positive, default=10.0, metavar="SECONDS", help="how long [10]")
    sub.add_argument("--confirm", metavar="HOST", help="the host of --url again, if it is another machine")
    sub.add_argument("--json", action="store_true", help="JSON instead of text")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


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
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    command = options["command"]
    if command in CLIENT_COMMANDS:
        return _run_client(CLIENT_COMMANDS[command], options)
    if command == "key":
        print_key(options["name"])
        return 0
    if command == "completion":
        print_completion(options["shell"], parser)
        return 0
    return _run_node(command, options)


def _run_node(command: str, options: dict[str, Any]) -> int:
    """The commands that have settings."""
    flags = {name: options[name] for name in FIELDS if options[name] is not None}
    file = options["config"] or os.environ.get(f"{ENV_PREFIX}CONFIG")
    try:
        loaded = load(flags, os.environ, Path(file) if file else None)
        settings = loaded.settings
        if command == "config":
            print_settings(loaded)
            return 0
        from pushup.logs import configure

        configure(settings.log_level, settings.log_format)
        if command == "nodes":
            print_nodes(settings, as_json=options["json"])
        elif settings.workers > 1:
            from pushup.workers import Workers

            workers = Workers(settings, serve_as_worker)
            return workers.run(partial(announce_workers, settings, workers.address))
        else:
            return _run(settings, announce)
    except PushUpError as error:
        return complain(error) if command == "nodes" else _complain(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED if command == "nodes" else EXIT_FAILED
    return 0


def _run_client(run: Callable[[dict[str, Any]], int], options: dict[str, Any]) -> int:
    """The commands of clients, with their exit statuses."""
    try:
        status = run(options)
        sys.stdout.flush()
    except PushUpError as error:
        return complain(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _print_no_more()
        return EXIT_READER_GONE
    except OSError as error:
        # Whatever else does input and output has told its own errors by now.
        _print_no_more()
        return complain(PushUpError(f"cannot print: {error.strerror or error}"))
    return status


def _print_no_more() -> None:
    """Throw away what is left in the buffer, which would complain once more when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def complain(error: PushUpError, where: str = "") -> int:
    """Tell what a client's command has met in one sentence; the exit status for it."""
    print(f"pushup: {where}{error}", file=sys.stderr)
    for kinds, status in (
        ((Unauthorized, Forbidden), EXIT_REFUSED),
        ((Unavailable, TooMany), EXIT_UNAVAILABLE),
        ((SettingsError, InvalidRequest), EXIT_WRONG_SETTING),
    ):
        if isinstance(error, kinds):
            return status
    return EXIT_FAILED


def _publish(options: dict[str, Any]) -> int:
    from pushup.commands import make_data, open_publisher, publish, publish_lines, split_channels

    if options["lines"] == (options["data"] is not None):
        raise SettingsError("publish wants either DATA or --lines")
    channels, key, as_json = split_channels(options["channels"]), options["key"], options["json"]
    source = sys.stdin.buffer
    if options["lines"]:
        with open_publisher(options, os.environ) as publisher:
            return publish_lines(
                publisher, channels, source, key, as_text=options["text"], as_json=as_json, complain=complain
            )
    text = source.read() if options["data"] == "-" else os.fsencode(options["data"])
    data = make_data(text, as_text=options["text"])
    with open_publisher(options, os.environ) as publisher:
        publish(publisher, channels, data, key, as_json=as_json)
    return 0


def _listen(options: dict[str, Any]) -> int:
    import asyncio
    import logging

    from pushup.commands import CursorFile, Notices, find_service, listen, parse_beginning

    notices = Notices(as_json=options["json"])
    log = logging.getLogger("pushup.client")
    log.setLevel(logging.INFO)
    log.addHandler(notices)
    file = options["cursor_file"]
    try:
        asyncio.run(
            listen(
                find_service(options, os.environ),
                options["channels"],
                start=parse_beginning(options["start"]),
                cursor_file=CursorFile(Path(file)) if file else None,
                count=options["count"],
                seconds=options["seconds"],
                only_data=options["data"],
                notices=notices,
            )
        )
    finally:
        log.removeHandler(notices)
    return 0


def _channels(options: dict[str, Any]) -> int:
    import asyncio

    from pushup.commands import find_service, list_channels, print_channels

    service = find_service(options, os.environ)
    print_channels(asyncio.run(list_channels(service)), as_json=options["json"])
    return 0


def _bench(options: dict[str, Any]) -> int:
    import asyncio

    import uvloop

    from pushup.bench import Load, ProgressBar, check, measure, show_report, to_json
    from pushup.commands import find_service
    from pushup.dialogue import parse_base

    service = find_service(options, os.environ)
    load = Load(
        url=parse_base(service.url, service.realm).url,
        token=service.token() if service.token else None,
        **{name: options[name] for name in ("pollers", "channels", "rate", "seconds", "size")},
    )
    check(load, options["confirm"])
    bar = ProgressBar(sys.stderr) if sys.stderr.isatty() else None
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(measure(load, bar or (lambda what, done, total: None)))
    finally:
        if bar:
            bar.wipe()
    if options["json"]:
        print(to_json(report))
    else:
        print(show_report(report, fancy=(sys.stdout.encoding or "").lower().startswith("utf")))
    if report.warning:
        print(f"pushup: {report.warning}", file=sys.stderr)
    return 0 if report.kept else EXIT_FAILED


CLIENT_COMMANDS: Final = {"publish": _publish, "listen": _listen, "channels": _channels, "bench": _bench}


def serve_as_worker(settings: Settings, ready: "Connection[Any, Any]") -> None:
    """One of several processes on a port. Whoever minds it hears the admin address once it serves."""
    from pushup.logs import configure

    configure(settings.log_level, settings.log_format)
    # Ctrl-C in a terminal goes to the process that minds this one, which passes it on.
    os.setsid()
    try:
        status = _run(settings, lambda server: ready.send(server.admin_address), shares_port=True)
    except PushUpError as error:
        sys.exit(_complain(error))
    if status:
        sys.exit(status)


def _complain(error: PushUpError) -> int:
    """The same for a node, which fails or has a wrong setting."""
    print(f"pushup: {error}", file=sys.stderr)
    return EXIT_WRONG_SETTING if isinstance(error, SettingsError) else EXIT_FAILED


def _run(settings: Settings, announce: "Callable[[Server], None]", *, shares_port: bool = False) -> int:
    """Serve; the exit status."""
    import asyncio

    import uvloop

    from pushup.server import serve

    # What is loaded by now stays; a parked poll makes no garbage that only the collector would find.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    _keep_large_blocks_apart()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(settings, announce, shares_port=shares_port))
        except asyncio.CancelledError:
            return EXIT_FAILED
    return 0


def _keep_large_blocks_apart() -> None:
    """Have large buffers go back to the system when they are freed. Else glibc keeps them once it has seen a few."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def announce(server: "Server") -> None:
    """Say where it listens, on which broker, and who may use it."""
    _announce(server.settings, server.address, server.admin_address)


def announce_workers(settings: Settings, address: str, admin_addresses: Sequence[str]) -> None:
    """The same for several processes on one port."""
    _announce(settings, address, ", http://".join(admin_addresses))


def _announce(settings: Settings, address: str, admin_address: str) -> None:
    from pushup.address import parse_address

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
    from pushup.access import hash_key, make_key

    key = make_key()
    print(f"the key, which is shown this once: {key}", file=sys.stderr)
    print(f"[[realms.default.keys]]\nname = {json.dumps(name)}\nhash = {json.dumps(hash_key(key))}")
    print('actions = ["publish", "manage"]\nchannels = ["*"]')


def print_completion(shell: str, parser: argparse.ArgumentParser) -> None:
    """The script for a shell."""
    from pushup.completion import make_script

    hints = get_type_hints(Settings)
    choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    switches = {name: ("true", "false") for name, hint in hints.items() if hint is bool}
    print(make_script(shell, parser, {**choices, **switches}), end="")


def print_nodes(settings: Settings, *, as_json: bool) -> None:
    """The nodes of the realm, as a table or as JSON."""
    import asyncio

    import msgspec

    from pushup.nodes import fetch_nodes, show_nodes

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
