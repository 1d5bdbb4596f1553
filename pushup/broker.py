"""What a node asks of the place where messages are kept: the contract, in writing.

`memory` keeps it for one node, `redis_broker` for many.

One broker object serves one realm. Ids come from the realm's clock: microseconds since the Unix epoch, made strictly
increasing over all channels of the realm (`id = max(now, last + 1)`), and never go backwards.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pushup.errors import PushUpError
from pushup.messages import ChannelInfo, ChannelOptions, History, Message, NodeInfo, Publication, Receipt


def now_us() -> int:
    """Microseconds since the Unix epoch."""
    return time.time_ns() // 1000


Tell = Callable[[Sequence[Receipt | PushUpError]], None]
"""Whom to tell the results of publications, one for each."""


class Listener(Protocol):
    """The node's side: what a broker calls, always on the event loop, never twice for one event."""

    def on_message(self, channel: str, message: Message, prev: int) -> None:
        """A message was stored in a watched channel; `prev` is the id before it there. In id order over all."""

    def on_closed(self, channel: str) -> None:
        """A watched channel was closed. Comes after every message that was stored in it before."""

    def on_doubt(self, channels: Sequence[str] | None) -> None:
        """These watched channels (None: all) must be read again: made anew, or events may have been missed."""

    def on_position(self) -> None:
        """The position has moved on without an event."""

    def about(self) -> NodeInfo:
        """What the node says of itself to whoever lists the nodes."""


class Broker(Protocol):
    """Keeps the messages of one realm. Every coroutine raises Unavailable if the store does not answer in time."""

    @property
    def name(self) -> str:
        """What an operator calls it: the URL without secrets."""

    @property
    def ready(self) -> bool:
        """Whether events certainly reach this node: false as soon as there is a doubt about it."""

    async def start(self, listener: Listener) -> None:
        """Connect. Events go to `listener` from now on. Raises Unavailable."""

    async def stop(self) -> None:
        """Let go of everything."""

    def position(self) -> int:
        """Every message below it in a watched channel has been given to the listener; no later one is below it.

        O(1), no I/O: what is known now, which may be less than what is true.
        """

    def latest(self) -> int:
        """About the id that a message stored now would get, for polls that want later ones. O(1), no I/O."""

    async def watch(self, wanted: Mapping[str, int]) -> Mapping[str, History | None]:
        """Watch channels and read each from the given id on; None for one that does not exist and must be created.

        When it returns, every message stored later than the history reaches the listener. A history is whole or has a
        floor no higher than what was asked for. Watching a watched channel reads it again.
        """

    def unwatch(self, channels: Sequence[str]) -> None:
        """Nobody waits for these any more. Their events stop, now or a little later."""

    async def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | PushUpError]:
        """Store each publication, in order, in all its channels or in none, under one id; a result for each.

        A publication whose `key` was seen within the idempotency window stores nothing and gets the first one's id, or
        KeyReused if it differs from the first. ChannelNotFound if a channel must exist and does not.
        """

    def submit(self, publications: Sequence[Publication], tell: Tell) -> None:
        """The same as `publish` for who does not await: `tell` is called once, at once or later."""

    async def create(self, name: str | None, options: ChannelOptions) -> ChannelInfo:
        """Make a channel; without a name, one with an integer id never used before. Raises ChannelExists."""

    async def renew(self, name: str, ttl: float | None) -> ChannelInfo:
        """Put off the channel's expiry to `ttl` (or its own ttl) seconds from now. Raises ChannelNotFound."""

    async def close(self, name: str) -> None:
        """End the channel: its messages go, its polls are answered. Raises ChannelNotFound."""

    async def describe(self, name: str) -> ChannelInfo:
        """The channel's facts. Raises ChannelNotFound."""

    async def channels(self, after: str, limit: int) -> Sequence[ChannelInfo]:
        """Up to `limit` channels with names greater than `after`, sorted by name."""

    async def nodes(self) -> Sequence[NodeInfo]:
        """The nodes of the realm that were heard of in the last minute, by name."""
