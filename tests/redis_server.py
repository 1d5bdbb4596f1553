"""One real Redis server for tests, in a process of its own."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.processes import free_ports
from tests.support import PATIENCE_S

CONFIG = ("bind 127.0.0.1", 'save ""', "appendonly yes", "appendfsync always", "enable-debug-command yes")


class RedisServer:
    """A server with its files in `folder`, started at once. Further lines of configuration win over the usual ones."""

    def __init__(self, folder: Path, *config: str) -> None:
        if shutil.which("redis-server") is None:
            pytest.fail("redis-server is missing: install it (Debian: apt install redis-server)", pytrace=False)
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}"
        self._data = folder / "redis"
        self._config = folder / "redis.conf"
        self._config.write_text("\n".join([*CONFIG, f"port {self.port}", f"dir {self._data}", *config, ""]))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it with the files it has, and wait until it answers."""
        self._data.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(["redis-server", self._config], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"redis-server does not start on port {self.port}", pytrace=False)
                time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It neither answers nor ends."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self, *, empty: bool = False) -> None:
        """Kill it and start it again, with its files or without."""
        self.kill()
        if empty:
            shutil.rmtree(self._data)
        self.start()

    def client(self) -> redis.Redis:
        """A client for the test's own use."""
        return redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0), socket_timeout=PATIENCE_S)
