"""Publishing straight into Redis, without a node: for back ends. Messages are the same as those published over HTTP.

    with Publisher("redis://localhost") as publisher:
        publisher.publish("news", {"headline": "It works"})

`AsyncPublisher` is the same with `async with` and `await`. See `redis_url` for URLs.
"""

import asyncio
import os
import selectors
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Self, TypeVar

from pushup.caller import Caller
from pushup.errors import PushUpError
from pushup.library import Library, Stored
from pushup.messages import Publication, Receipt
from pushup.publications import Channels, make_publication, make_publications, only
from pushup.redis_url import parse_servers

_T = TypeVar("_T")

TIMEOUT_S: Final = 5.0
PUBLISHED_AT_ONCE: Final = 512
"""Publications in one write. More would keep Redis from everybody else for long."""


def _merge(
    parsed: Sequence[Publication | PushUpError], replies: Sequence[Stored | PushUpError]
) -> list[Receipt | PushUpError]:
    stored = iter(replies)
    results: list[Receipt | PushUpError] = []
    for item in parsed:
        reply = item if isinstance(item, PushUpError) else next(stored)
        results.append(reply if isinstance(reply, PushUpError) else reply[0])
    return results


class AsyncPublisher:
    """Publishes to one realm. One connection, opened with the first publication; use it from one event loop.

    `timeout` is the seconds one call may take, tries included.
    """

    def __init__(self, url: str, *, realm: str = "default", timeout: float = TIMEOUT_S) -> None:
        self._caller = Caller(parse_servers(url), Library(realm), timeout)
        self._seen = 0
        self._origin = ""
        self._seen_there = 0
        """The highest id that came from there."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def publish(self, channels: Channels, data: Any, *, key: str | None = None) -> int:
        """Publish one message to one or more channels; its id.

        With a `key` a publication is stored once, however often it is repeated, here or by the caller. Without one it
        is not repeated once Redis may have it: Unavailable then says that it may have been stored.
        Raises ChannelNotFound, KeyReused, InvalidParameter, InvalidRequest, TooLarge, Unavailable.
        """
        return only(await self._publish([make_publication(channels, data, key)]))

    async def publish_many(self, items: Iterable[Mapping[str, Any]]) -> list[Receipt | PushUpError]:
        """Publish `{"channels": …, "data": …, "key": …}` in order, pipelined; for each the receipt or the error."""
        return await self._publish(make_publications(items))

    async def close(self) -> None:
        """Close the connection."""
        await self._caller.stop()

    async def _publish(self, parsed: Sequence[Publication | PushUpError]) -> list[Receipt | PushUpError]:
        publications = [item for item in parsed if not isinstance(item, PushUpError)]
        replies: list[Stored | PushUpError] = []
        for at in range(0, len(publications), PUBLISHED_AT_ONCE):
            replies += await self._caller.publish(self._seen, publications[at : at + PUBLISHED_AT_ONCE])
        for reply in replies:
            if not isinstance(reply, PushUpError):
                await self._note(*reply)
        return _merge(parsed, replies)

    async def _note(self, receipt: Receipt, origin: str) -> None:
        """Remember the receipt. Tell a server that is new here what the one before had given: it may not have it."""
        self._seen = max(self._seen, receipt.id)
        if self._origin not in ("", origin):
            try:
                await self._caller.call(self._caller.library.witness(self._seen, self._origin, self._seen_there))
            except PushUpError:
                return  # The next receipt will have it said.
            self._seen_there = 0
        self._origin = origin
        self._seen_there = max(self._seen_there, receipt.id)


class Publisher:
    """The same for blocking programs: an AsyncPublisher on an event loop in a thread of its own.

    May be used from several threads. A process that was forked off begins with a connection of its own.
    """

    def __init__(self, url: str, *, realm: str = "default", timeout: float = TIMEOUT_S) -> None:
        parse_servers(url)
        self._make = partial(AsyncPublisher, url, realm=realm, timeout=timeout)
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self, channels: Channels, data: Any, *, key: str | None = None) -> int:
        """See AsyncPublisher.publish."""
        worker = self._started()
        return worker.run(worker.publisher.publish(channels, data, key=key))

    def publish_many(self, items: Iterable[Mapping[str, Any]]) -> list[Receipt | PushUpError]:
        """See AsyncPublisher.publish_many."""
        worker = self._started()
        return worker.run(worker.publisher.publish_many(items))

    def close(self) -> None:
        """Close the connection. A later publication opens another."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None and worker.process == os.getpid():
            worker.stop()

    def _started(self) -> "_Worker":
        with self._lock:
            if self._worker is None or self._worker.process != os.getpid():
                self._worker = _Worker(self._make())
            return self._worker


class _Worker:
    """An event loop in a thread."""

    def __init__(self, publisher: AsyncPublisher) -> None:
        self.publisher = publisher
        self.process = os.getpid()
        # Polling, as a forked process would share an epoll object, and empty it when it ends.
        self._loop = asyncio.SelectorEventLoop(selectors.PollSelector())
        self._thread = threading.Thread(target=self._loop.run_forever, name="pushup-publisher", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def stop(self) -> None:
        self.run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        """Close the publisher, and let those who wait for a result have it."""
        await self.publisher.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
