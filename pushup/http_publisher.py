"""Publishing over HTTP: for back ends that have a key rather than Redis. The interface is that of `publisher`.

    with HttpPublisher("https://push.example.com", KEY) as publisher:
        publisher.publish("news", {"headline": "It works"})

`AsyncHttpPublisher` is the same with `async with` and `await`.
"""

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Self
from uuid import uuid4

import pushup.dialogue as dialogue
from pushup.client import AsyncPerformer
from pushup.dialogue import TIMEOUT_S, Surroundings, parse_base
from pushup.errors import PushUpError
from pushup.messages import Receipt
from pushup.publications import Channels
from pushup.sync_client import Performer


def _random_key() -> str:
    return uuid4().hex


def _no_key() -> None:
    return None


class AsyncHttpPublisher:
    """Publishes to one realm over HTTP. Connections are opened when needed; use it from one event loop.

    `url` is `http(s)://HOST[:PORT][/PREFIX]`, `key` what `pushup key` printed (None: the realm asks for none), `realm`
    None for the one whose paths have no prefix. `timeout` is the seconds one request may take, tries included.

    `retry` gives each publication without a key a random one, which lives as long as the call: it is then repeated
    when an answer is lost, and stored once all the same. It is not the default, as a key takes room in the service for
    five minutes. A key of your own does more: it also covers your own repetitions.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        realm: str | None = None,
        timeout: float = TIMEOUT_S,
        retry: bool = False,
        ssl_context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._performer = AsyncPerformer(parse_base(url, realm), key, ssl_context, sleep)
        self._around = Surroundings(clock, random, timeout)
        self._new_key = _random_key if retry else _no_key

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def publish(self, channels: Channels, data: Any, *, key: str | None = None) -> int:
        """Publish one message to one or more channels; its id.

        With a `key` a publication is stored once, however often it is repeated, here or by the caller. Without one it
        is not repeated once the server may have it: Unavailable then says that it may have been done.
        Raises ChannelNotFound, KeyReused, InvalidParameter, InvalidRequest, TooLarge, Unavailable, and what there is
        over HTTP only: Unauthorized, Forbidden, TooManyPublications.
        """
        return await self._performer.run(dialogue.publish(self._around, channels, data, key, self._new_key))

    async def publish_many(self, items: Iterable[Mapping[str, Any]]) -> list[Receipt | PushUpError]:
        """Publish `{"channels": …, "data": …, "key": …}` in order; for each the receipt or the error.

        Up to 1,000 publications or 1 MiB go into one request. What is repeated comes after the rest of its request.
        """
        return await self._performer.run(dialogue.publish_many(self._around, items, self._new_key))

    async def close(self) -> None:
        """Close the connections, for good."""
        await self._performer.close()


class HttpPublisher:
    """The same for blocking programs. Its parameters are those of AsyncHttpPublisher.

    May be used from several threads, each with a connection for the time of a request. A process that was forked off
    begins with connections of its own.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        realm: str | None = None,
        timeout: float = TIMEOUT_S,
        retry: bool = False,
        ssl_context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._performer = Performer(parse_base(url, realm), key, ssl_context, sleep, clock)
        self._around = Surroundings(clock, random, timeout)
        self._new_key = _random_key if retry else _no_key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self, channels: Channels, data: Any, *, key: str | None = None) -> int:
        """See AsyncHttpPublisher.publish."""
        return self._performer.run(dialogue.publish(self._around, channels, data, key, self._new_key))

    def publish_many(self, items: Iterable[Mapping[str, Any]]) -> list[Receipt | PushUpError]:
        """See AsyncHttpPublisher.publish_many."""
        return self._performer.run(dialogue.publish_many(self._around, items, self._new_key))

    def close(self) -> None:
        """Close the connections that are idle. A later publication opens another."""
        self._performer.let_go()
