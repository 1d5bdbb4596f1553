"""Several node processes on one port, which the kernel deals new connections out to, and the process that minds them.

Each worker is a node of its own, with its own line in the list of nodes and its own admin port: the one in the settings
for the first, the next one for the second, and so on. A worker that dies is replaced; SIGTERM, SIGINT and SIGHUP go to
all.
"""

import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final

import msgspec

from pushup.address import Address, parse_address
from pushup.errors import SettingsError
from pushup.settings import Settings

log = logging.getLogger("pushup.workers")

RESTART_PAUSE_S: Final = 1.0
PORT_MAX: Final = 65535

Serve = Callable[[Settings, "Connection[Any, Any]"], None]
"""Runs a node in this process and sends the admin address once it serves."""


class Workers:
    """The processes of one `pushup serve --workers N`."""

    def __init__(self, settings: Settings, serve: Serve) -> None:
        self._settings = settings
        self._serve = serve
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, BaseProcess] = {}
        """By number, from 0 on."""
        self._ready: dict[int, Connection[Any, Any]] = {}
        self._signals: list[int] = []
        _check_admin_ports(settings)
        self._reserved = _reserve(settings.listen)
        self.address = str(Address(*self._reserved.getsockname()[:2]))
        """HOST:PORT they serve on, with the real port if 0 was asked for."""

    def run(self, announce: Callable[[Sequence[str]], None]) -> int:
        """Start all, `announce` their admin addresses, mind them until a signal; the exit status."""
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_hangup)
        for number in range(self._settings.workers):
            self._start(number)
        try:
            announce([connection.recv() for connection in self._ready.values()])
        except EOFError:
            # A worker that could not start has said why; or there was a signal.
            if not self._signals:
                self._pass_on(signal.SIGTERM)
            return max(self._join(), default=0)
        while not self._signals:
            ended = wait([process.sentinel for process in self._processes.values()], timeout=1.0)
            for number, process in list(self._processes.items()):
                if process.sentinel in ended and not self._signals:
                    log.error("a worker died", extra={"worker": number, "exit": process.exitcode})
                    del self._processes[number]
                    time.sleep(RESTART_PAUSE_S)
                    self._start(number)
        return max(self._join(), default=0)

    def _start(self, number: int) -> None:
        """Start a worker, unless all are to end."""
        told = len(self._signals)
        if told:
            return
        settings = worker_settings(self._settings, number, self.address)
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(target=self._serve, args=(settings, sending), name=f"pushup-worker-{number}")
        # Until it listens to this signal itself the new process is to ignore it, as it inherits from here.
        treated = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        process.start()
        signal.signal(signal.SIGHUP, treated)
        sending.close()
        self._processes[number] = process
        self._ready[number] = receiving  # Kept, or the worker would write to nobody.
        if len(self._signals) > told:
            # It came before this process was among those that are told.
            self._pass_on(self._signals[-1], [process])

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals.append(number)
        self._pass_on(number)

    def _on_hangup(self, number: int, frame: object) -> None:
        self._pass_on(number)

    def _pass_on(self, number: int, processes: Iterable[BaseProcess] | None = None) -> None:
        for process in self._processes.values() if processes is None else processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def _join(self) -> list[int]:
        for process in self._processes.values():
            process.join()
        self._reserved.close()
        # One that was told to end before it could listen to that has failed in nothing.
        codes = [process.exitcode or 0 for process in self._processes.values()]
        return [0 if code == -signal.SIGTERM else abs(code) for code in codes]


def worker_settings(settings: Settings, number: int, address: str) -> Settings:
    """Those of worker `number`, from 0 on, of a service at this address."""
    admin = parse_address(settings.admin_listen)
    if admin.port:
        admin = admin._replace(port=admin.port + number)
    name = settings.name if settings.name == "auto" else f"{settings.name}-{number + 1}"
    return msgspec.structs.replace(settings, listen=address, admin_listen=str(admin), name=name, workers=1)


def _check_admin_ports(settings: Settings) -> None:
    last = parse_address(settings.admin_listen).port + settings.workers - 1
    if last > PORT_MAX:
        raise SettingsError(
            f"admin_listen = {settings.admin_listen!r}: {settings.workers} workers need ports up to {last}"
        )


def _reserve(listen: str) -> socket.socket:
    """A socket that holds the port without taking connections. Raises SettingsError."""
    address = parse_address(listen)
    reserved = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        # Without sharing first: a port that somebody else has, be it another service of ours, is taken.
        with socket.socket(reserved.family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(tuple(address))
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(tuple(address))
    except OSError as error:
        reserved.close()
        raise SettingsError(f"listen = {listen!r}: cannot listen there: {os.strerror(error.errno or 0)}") from None
    return reserved
