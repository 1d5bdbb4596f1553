"""`python -m compose.example`: the question board on waitress, a threaded WSGI server."""

import argparse
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from typing import Final

from waitress.server import create_server

from compose.example.app import make_app
from compose.example.questions import Questions
from pushup import Publisher
from pushup.address import parse_address

THREADS: Final = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; requests that have begun are finished. The exit status."""
    parser = argparse.ArgumentParser(prog="python -m compose.example", description=__doc__)
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:8000", help="[%(default)s]")
    parser.add_argument("--broker", metavar="URL", required=True, help="PushUp's Redis, as the nodes have it")
    parser.add_argument("--realm", metavar="NAME", default="default", help="PushUp's realm [%(default)s]")
    parser.add_argument("--database", metavar="FILE", default="", help="where questions are kept [in memory]")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        listen = parse_address(given.listen)
    except ValueError as error:
        parser.error(f"--listen {given.listen}: {error}")
    try:
        publisher = Publisher(given.broker, realm=given.realm)
    except ValueError as error:
        parser.error(f"--broker: {error}")
    try:
        questions = Questions(given.database)
    except sqlite3.Error as error:
        print(f"question board: cannot use the database {given.database}: {error}", file=sys.stderr)
        return 1
    try:
        with publisher:
            app = make_app(questions, publisher)
            server = create_server(app, host=listen.host, port=listen.port, threads=THREADS, ident=None)
            print(f"question board  http://{listen.host}:{server.effective_port}", flush=True)
            server.run()
    except OSError as error:
        print(f"question board: cannot listen on {listen}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return 1
    finally:
        questions.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
