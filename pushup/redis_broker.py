"""The broker for many nodes: messages in Redis, announcements over its sharded pub/sub.

What a node hears comes on one connection, a *session*, to the server that owns the realm, in the order in which the
server did it. A session begins with a proof that the node hears what it says, and is proved again by every tick: the
node calls `tick`, and must hear the echo on its own pub/sub channel. Because the echo comes behind everything announced
before, it also says how far the node has heard (`position`). A session that breaks, falls silent, or turns out to be
with another server than the one that answers calls, ends. The next one puts every channel in doubt, and the node reads
them again; until then the position stands still, so no cursor can pass what was missed.

See `library.lua` for what happens in Redis, and how a restart, a failover or lost keys are noticed there.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from redis.asyncio.connection import AbstractConnection

from pushup.address import Address
from pushup.broker import Listener, Tell
from pushup.caller import UNKNOWN, Caller
from pushup.errors import BrokerRefused, PushUpError, Unavailable
from pushup.library import (
    Echo,
    Library,
    PubSub,
    Stored,
    parse_echo,
    parse_event,
    parse_histories,
    parse_info,
    parse_nodes,
    parse_position,
)
from pushup.link import ErrorReply, Link, Lost, cancel
from pushup.messages import SECOND, ChannelInfo, ChannelOptions, History, NodeInfo, Publication, Receipt, Retention
from pushup.redis_url import Servers

log = logging.getLogger("pushup.broker")

TICK_S: Final = 1.0
TICKS_PER_ATTACH: Final = 30
ECHO_S: Final = 3.0
"""How long after a tick was answered its echo may take. Then the session is not to be trusted any more."""
PAUSE_S: Final = 0.05
"""Before the next session, doubled after each that failed, up to..."""
PAUSE_MAX_S: Final = 1.0
SLOWLY: Final = 0.99
READ_AT_ONCE: Final = 64
"""Channels read in one call, during which Redis does nothing else."""
AUDITED_PER_TICK: Final = 64


class Session:
    """One connection on which announcements come, from its first proof to its end."""

    def __init__(
        self, connection: AbstractConnection, address: Address, origin: str, pubsub: PubSub, heard: "Heard"
    ) -> None:
        self.address = address
        self.origin = origin
        """Which run of the server this session is to be with, and which life of the realm."""
        self.token = secrets.token_hex(8)
        self.pubsub = pubsub
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why it ended."""
        self._heard = heard
        self._link = Link(connection, self._receive, self._end)
        self._confirmed: dict[str, asyncio.Future[None]] = {}
        """By pub/sub channel: whether the server has confirmed that it announces it here."""
        self._leaving: dict[str, int] = {}
        """Confirmations still to come that this node has unsubscribed."""

    async def connect(self) -> None:
        """Raises Lost."""
        await self._link.connect()

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()

    def end(self, reason: str) -> None:
        """This session is not to be trusted any more."""
        self._link.end(reason)

    def watches(self, name: str) -> bool:
        """Whether the channel's announcements are wanted here."""
        return self.pubsub.announcements(name) in self._confirmed

    async def subscribe(self, heard_on: Sequence[str]) -> None:
        """Return once the server has confirmed all of these. Shared by whoever wants the same. Raises Lost."""
        fresh = [name for name in heard_on if name not in self._confirmed]
        loop = asyncio.get_running_loop()
        for name in fresh:
            self._confirmed[name] = loop.create_future()
        if fresh:
            self._link.send(("SSUBSCRIBE", *fresh))
        waiting: set[asyncio.Future[Any]] = {self._confirmed[name] for name in heard_on}
        while waiting := {future for future in waiting if not future.done()}:
            await asyncio.wait({*waiting, self.ended}, return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                break
        if self.ended.done():
            raise Lost(self.ended.result())

    def unsubscribe(self, heard_on: Sequence[str]) -> None:
        """Not wanted any more."""
        names = [name for name in heard_on if name in self._confirmed]
        for name in names:
            future = self._confirmed.pop(name)
            if not future.done():
                future.set_result(None)  # Who waits for it wants it no more than the others do.
            self._leaving[name] = self._leaving.get(name, 0) + 1
        if names:
            self._link.send(("SUNSUBSCRIBE", *names))

    def watched(self) -> list[str]:
        """The channels whose announcements come here for certain."""
        names = [self.pubsub.channel_of(heard_on) for heard_on, future in self._confirmed.items() if future.done()]
        return [name for name in names if name is not None]

    def _receive(self, reply: Any) -> None:
        if isinstance(reply, ErrorReply):
            self.end(str(reply))
            return
        kind, heard_on, payload = reply
        name = heard_on.decode()
        if kind == b"smessage":
            self._heard(self, self.pubsub.channel_of(name), payload)
            return
        if kind == b"ssubscribe":
            future = self._confirmed.get(name)
            if future is not None and not self._leaving.get(name) and not future.done():
                future.set_result(None)
        elif kind == b"sunsubscribe":
            if self._leaving.get(name):
                self._leaving[name] -= 1
                if not self._leaving[name]:
                    del self._leaving[name]
            elif name in self._confirmed:
                self.end("the server no longer has the realm's slot")

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)


Heard = Callable[[Session, str | None, bytes], None]
"""What is done with a payload that a session brought for a channel, or for the node itself (None)."""

Outgoing = tuple[Sequence[Publication], Tell]
"""Publications, and whom to tell their results."""


class RedisBroker:
    """A realm in Redis. See `broker.Broker` for the contract.

    `node` is this node's name in the list of nodes, `timeout` how long one call may take in seconds, `dialer` makes
    connections (tests replace it).
    """

    def __init__(
        self,
        servers: Servers,
        realm: str,
        retention: Retention,
        *,
        node: str,
        timeout: float,
        dialer: Callable[[Address], AbstractConnection] | None = None,
    ) -> None:
        self.name = servers.shown
        self.sessions = 0
        """How many sessions there have been."""
        self._library = Library(realm)
        self._retention = retention
        self._node = node
        self._timeout = timeout
        self._caller = Caller(servers, self._library, timeout, dialer)
        self._listener: Listener
        self._session: Session | None = None
        """The one that is proved; None while there is none."""
        self._proved = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._echoed = 0.0
        """When the last echo came. Not by the event loop's clock, which stands still while much is to be done."""
        self._echo_position = 0
        self._position = 0
        self._floor = 0
        self._seen = 0
        """The highest id this node knows of."""
        self._origin = ""
        self._seen_there = 0
        """The highest id it knows of from there."""
        self._last_heard: dict[str, int] = {}
        """By audited channel, the last id announced or read."""
        self._audits: list[str] = []
        self._outgoing: list[Outgoing] = []
        self._publishing: set[asyncio.Task[None]] = set()
        self._next_proof: asyncio.Future[None]
        """Done when another session is proved."""
        self._echo: asyncio.Future[None]
        """Done when the tick under way is heard."""

    @property
    def ready(self) -> bool:
        """Whether this node has lately heard what it said."""
        return self._session is not None and time.monotonic() - self._echoed < TICK_S + ECHO_S

    # From start to stop

    async def start(self, listener: Listener) -> None:
        """Return once there is a session. Raises Unavailable if there is none in time."""
        self._listener = listener
        self._next_proof = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        try:
            async with asyncio.timeout(self._timeout):
                await self._proved.wait()
        except TimeoutError:
            await self.stop()
            raise Unavailable(f"cannot reach the broker {self.name}: {self._caller.trouble}") from None

    async def stop(self) -> None:
        hearing = self._session is not None
        if self._supervisor is not None:
            await cancel(self._supervisor)
        await asyncio.gather(*self._publishing)
        if hearing:
            with contextlib.suppress(PushUpError):
                await self._caller.call(self._library.leave(self._node))
        await self._caller.stop()

    async def _supervise(self) -> None:
        pause = PAUSE_S
        while True:
            sessions = self.sessions
            try:
                reason = await self._serve()
            except (Lost, PushUpError) as error:
                reason = str(error)
            except Exception:
                log.exception("a session failed")
                reason = "an error in PushUp"
            if self.sessions > sessions:
                pause = PAUSE_S
            log.warning("lost the broker", extra={"broker": self.name, "reason": reason})
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, PAUSE_MAX_S)

    async def _serve(self) -> str:
        """One session, from beginning to end, and why it ended. Raises Lost or PushUpError if it never began."""
        caller, library = self._caller, self._library
        origin = await self._attach()
        session = Session(caller.connection(), caller.address, origin, library.pubsub(origin), self._hear)
        try:
            await session.connect()
            await session.subscribe([session.pubsub.echoes(self._node)])
            await self._tick(session)
            ticker = asyncio.create_task(self._keep_ticking(session))
            try:
                either: set[asyncio.Future[Any]] = {ticker, session.ended}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if ticker.done():
                    ticker.result()
                return session.ended.result()
            finally:
                await cancel(ticker)
        finally:
            if self._session is session:
                self._session = None
                self._proved.clear()
            await session.close()

    async def _attach(self) -> str:
        """Tell the server what holds in this realm, and what is known of it here; the origin."""
        kept = await self._keeps()
        call = self._library.attach(self._seen, self._origin, self._seen_there, kept, self._retention)
        _, origin = parse_position(await self._caller.call(call))
        return origin

    async def _keeps(self) -> bool:
        """Whether the server certainly keeps every acknowledged write over a restart. Raises Unavailable."""
        if self._caller.servers.kind != "server":
            return False
        try:
            appendfsync = await self._caller.call(("CONFIG", "GET", "append*"))
            replication = await self._caller.call(("INFO", "replication"))
        except BrokerRefused as error:
            log.info("cannot tell how durable the broker is", extra={"reason": str(error)})
            return False
        settings = dict(zip(appendfsync[::2], appendfsync[1::2], strict=True))
        return (
            settings.get(b"appendonly") == b"yes"
            and settings.get(b"appendfsync") == b"always"
            and b"role:master" in replication
            and b"connected_slaves:0" in replication
        )

    async def _keep_ticking(self, session: Session) -> None:
        for count in itertools.count(1):
            await asyncio.sleep(TICK_S)
            await self._tick(session)
            if count % TICKS_PER_ATTACH == 0 and not session.ended.done():
                with contextlib.suppress(PushUpError):
                    await self._attach()  # An operator may have changed how durable the server is.

    async def _tick(self, session: Session) -> None:
        """Prove the session once more, or end it."""
        echo = self._echo = asyncio.get_running_loop().create_future()
        try:
            call = self._library.tick(
                self._seen, self._node, session.token, self._listener.about(), self._next_audits(session)
            )
            _, origin = parse_position(await self._caller.call(call))
        except PushUpError as error:
            session.end(str(error))
            return
        if origin != session.origin or self._caller.address != session.address:
            session.end("another server has taken over")
            return
        await asyncio.wait({echo, session.ended}, timeout=ECHO_S, return_when=asyncio.FIRST_COMPLETED)
        if not echo.done():
            self._caller.reset("the server announces nothing")
            session.end("the server announces nothing")

    def _next_audits(self, session: Session) -> list[str]:
        """The channels whose last message is compared next: all of them, a few at a time."""
        if not self._audits:
            self._audits = session.watched()
        names = self._audits[-AUDITED_PER_TICK:]
        del self._audits[-AUDITED_PER_TICK:]
        return [name for name in names if name in self._last_heard]

    # What is heard

    def _hear(self, session: Session, name: str | None, payload: bytes) -> None:
        try:
            if name is None:
                self._hear_echo(session, parse_echo(payload))
                return
            event = parse_event(payload)
        except (PushUpError, ValueError) as error:
            # Not ours. Had it been a message, the next one's `prev` or an audit would tell.
            log.error("heard what PushUp did not say", extra={"channel": name, "error": error})
            return
        if session is not self._session or not session.watches(name):
            return
        if event is None:
            self._listener.on_doubt([name])
        elif isinstance(event, int):
            self._forget([name])
            self._advance(event)
            self._listener.on_closed(name)
        else:
            message, prev = event
            self._last_heard[name] = max(self._last_heard.get(name, 0), message.id)
            self._listener.on_message(name, message, prev)
            if name == next((other for other in reversed(message.channels) if session.watches(other)), name):
                self._advance(message.id + 1)

    def _hear_echo(self, session: Session, echo: Echo) -> None:
        if echo.token != session.token:
            return
        if echo.origin != session.origin:
            session.end("the server was restarted, or lost the realm")
            return
        self._echoed = time.monotonic()
        self._echo_position = echo.position
        if not self._echo.done():
            self._echo.set_result(None)
        if self._session is None:
            self._prove(session)
        elif echo.floor != self._floor:
            log.warning("the broker lost messages", extra={"broker": self.name, "below": echo.floor})
            self._listener.on_doubt(None)
        self._floor = echo.floor
        self._advance(echo.position)
        missed = [name for name, tail in echo.tails.items() if tail > self._last_heard.get(name, tail)]
        if missed:
            log.warning("missed announcements", extra={"channels": len(missed)})
            self._listener.on_doubt(missed)
        self._listener.on_position()

    def _prove(self, session: Session) -> None:
        if session.origin != self._origin:
            self._origin, self._seen_there = session.origin, 0
        self._session = session
        self._last_heard.clear()
        self._audits.clear()
        self.sessions += 1
        if self.sessions > 1:
            self._listener.on_doubt(None)
        self._proved.set()
        self._next_proof.set_result(None)
        self._next_proof = asyncio.get_running_loop().create_future()
        log.info("hearing the broker", extra={"broker": self.name, "server": str(session.address)})

    def _advance(self, position: int) -> None:
        self._position = max(self._position, position)
        self._seen = max(self._seen, position - 1)
        self._seen_there = max(self._seen_there, position - 1)

    # The contract

    def position(self) -> int:
        return self._position

    def latest(self) -> int:
        # Rather a little too early than too late: clocks differ in speed, too.
        return self._echo_position + int((time.monotonic() - self._echoed) * SLOWLY * SECOND)

    async def watch(self, wanted: Mapping[str, int]) -> Mapping[str, History | None]:
        histories: dict[str, History | None] = {}
        items = iter(wanted.items())
        while some := dict(itertools.islice(items, READ_AT_ONCE)):
            histories |= await self._watch(some)
        return histories

    async def _watch(self, wanted: Mapping[str, int]) -> Mapping[str, History | None]:
        names = list(wanted)
        while True:
            await self._proved.wait()
            session = self._session
            assert session is not None
            try:
                await session.subscribe([session.pubsub.announcements(name) for name in names])
            except Lost:
                await asyncio.sleep(PAUSE_S)  # The supervisor will see it, too.
                continue
            call = self._library.read(self._seen, self._node, session.token, wanted)
            histories, _, origin = parse_histories(await self._caller.call(call), names)
            if session.ended.done() or origin != session.origin:
                # What was read and what is heard may be of two servers.
                session.end("another server has taken over")
                await asyncio.sleep(PAUSE_S)
                continue
            for name, history in histories.items():
                if history is not None:
                    self._last_heard[name] = max(self._last_heard.get(name, 0), history.tail)
            self.unwatch([name for name, history in histories.items() if history is None])
            if all(history is None or session.watches(name) for name, history in histories.items()):
                return histories
            # Another read found no such channel, and unsubscribed what this one had taken for heard.

    def unwatch(self, channels: Sequence[str]) -> None:
        self._forget(channels)

    def _forget(self, channels: Sequence[str]) -> None:
        for name in channels:
            self._last_heard.pop(name, None)
        if self._session is not None:
            self._session.unsubscribe([self._session.pubsub.announcements(name) for name in channels])

    async def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | PushUpError]:
        results: asyncio.Future[Sequence[Receipt | PushUpError]] = asyncio.get_running_loop().create_future()
        self.submit(publications, lambda told: None if results.done() else results.set_result(told))
        return await results

    def submit(self, publications: Sequence[Publication], tell: Tell) -> None:
        if not self._outgoing:
            # It begins on the next turn of the loop, so that all publications of this turn go in one write.
            task = asyncio.get_running_loop().create_task(self._publish())
            self._publishing.add(task)
            task.add_done_callback(self._publishing.discard)
        self._outgoing.append((publications, tell))

    async def _publish(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        publications = [publication for some, _ in outgoing for publication in some]
        try:
            replies = iter(await self._confirm(await self._caller.publish(self._seen, publications)))
        except Exception:  # Whoever is told nothing waits for ever.
            log.exception("could not publish")
            replies = iter([Unavailable(UNKNOWN)] * len(publications))
        for some, tell in outgoing:
            results = [self._receipt(reply) for reply in itertools.islice(replies, len(some))]
            try:
                tell(results)
            except Exception:  # One publisher's trouble is not the others'.
                log.exception("could not tell what became of publications")

    async def _confirm(self, replies: Sequence[Stored | PushUpError]) -> Sequence[Stored | PushUpError]:
        """Believe no receipt of a server that has been replaced: it may have given it without knowing."""
        origins = {reply[1] for reply in replies if not isinstance(reply, PushUpError)}
        if origins <= {self._origin}:
            return replies
        # It may also be from the one with which the next session will be.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                while not origins <= {self._origin}:
                    await asyncio.shield(self._next_proof)
        return [
            reply if isinstance(reply, PushUpError) or reply[1] == self._origin else Unavailable(UNKNOWN)
            for reply in replies
        ]

    def _receipt(self, reply: Stored | PushUpError) -> Receipt | PushUpError:
        if isinstance(reply, PushUpError):
            return reply
        receipt, origin = reply
        self._seen = max(self._seen, receipt.id)
        if origin == self._origin:
            self._seen_there = max(self._seen_there, receipt.id)
        return receipt

    async def create(self, name: str | None, options: ChannelOptions) -> ChannelInfo:
        return parse_info(await self._caller.call(self._library.create(self._seen, name, options), repeatable=False))

    async def renew(self, name: str, ttl: float | None) -> ChannelInfo:
        return parse_info(await self._caller.call(self._library.renew(self._seen, name, ttl)))

    async def close(self, name: str) -> None:
        await self._caller.call(self._library.close(self._seen, name), repeatable=False)

    async def describe(self, name: str) -> ChannelInfo:
        return parse_info(await self._caller.call(self._library.describe(self._seen, name)))

    async def channels(self, after: str, limit: int) -> Sequence[ChannelInfo]:
        return [parse_info(info) for info in await self._caller.call(self._library.list(self._seen, after, limit))]

    async def nodes(self) -> Sequence[NodeInfo]:
        nodes, _ = parse_nodes(await self._caller.call(self._library.nodes()))
        return nodes
