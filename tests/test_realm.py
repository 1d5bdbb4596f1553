"""A realm: whom it knows, what is remembered of that, and what is counted of whom."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import pushup.realm
from pushup.access import NOT_GOOD, OPEN, Grant, KeyRules, RealmRules, TokenRules, hash_key, make_key
from pushup.errors import Forbidden, TokenExpired, TooManyPolls, TooManyPublications, Unauthorized, Unavailable
from pushup.memory import MemoryBroker
from pushup.metrics import Metrics
from pushup.node import Node
from pushup.peers import Peers
from pushup.realm import Realm, read_tokens
from pushup.sender import NOBODY, Sender
from pushup.service import Seat
from pushup.settings import Settings
from pushup.tokens import JWKS_KEPT_S, JWKS_PAUSE_S, Claims, KeysNeeded
from tests.support import eventually
from tests.test_tokens import (
    NOW,
    ec_key,
    ed_jwk,
    ed_key,
    es256,
    hs256,
    key_server,
    make_token,
    public_pem,
    secret_file,
    token_by,
)

__all__ = ["secret_file"]

BACKEND, READER = make_key(), make_key()
KEYS = (
    KeyRules(name="backend", hash=hash_key(BACKEND), actions=("publish", "manage"), channels=("news", "orders.*")),
    KeyRules(name="reader", hash=hash_key(READER), actions=("subscribe",)),
)


def make_realm(rules: RealmRules | None, **settings: Any) -> Realm:
    return Realm(Node(MemoryBroker(), Settings(**settings), Metrics()), rules)


def by_secret(secret_file: str, **more: Any) -> RealmRules:
    """Rules with two keys, and tokens by SECRET."""
    return RealmRules(keys=KEYS, tokens=TokenRules(secret_file=secret_file, publish=True), **more)


def token(*channels: str | int, exp: float = NOW + 60, publish: tuple[str, ...] = (), **claims: Any) -> str:
    return make_token({"exp": exp, "pushup": {"subscribe": channels, "publish": publish}, **claims}, hs256())


def shows(secret: str) -> Sender:
    """Whoever has it in Authorization."""
    return Sender(key=secret)


def may(grant: Grant, action: Any, channel: str) -> bool:
    try:
        grant.check(action, [channel])
    except Forbidden:
        return False
    return True


def use(realm: Realm, rules: RealmRules | None) -> None:
    """As a reload does."""
    realm.use(rules, read_tokens(rules))


# Whom it knows


async def test_where_access_is_open() -> None:
    """Nobody is asked, and whatever somebody shows is not looked at."""
    realm = make_realm(None)
    for sender in (NOBODY, shows("nonsense"), Sender(cookies="pushup_token=nonsense")):
        assert realm.recognise(sender, "nonsense", NOW) is OPEN
        assert await realm.meet(sender, None, NOW) is OPEN


async def test_keys_and_tokens(secret_file: str) -> None:
    """A key may what its rules say, a token what it says itself."""
    realm = make_realm(by_secret(secret_file))
    backend = realm.recognise(shows(BACKEND), None, NOW)
    assert [may(backend, "publish", name) for name in ("news", "orders.1", "other")] == [True, True, False]
    assert (may(backend, "manage", "news"), may(backend, "subscribe", "news")) == (True, False)
    reader = realm.recognise(shows(READER), None, NOW)
    assert (may(reader, "subscribe", "other"), may(reader, "publish", "other")) == (True, False)
    browser = realm.recognise(shows(token("a", publish=("b",))), None, NOW)
    assert (may(browser, "subscribe", "a"), may(browser, "subscribe", "b")) == (True, False)
    assert (may(browser, "publish", "a"), may(browser, "publish", "b")) == (False, True)
    assert not may(browser, "manage", "a")
    assert (backend.token, reader.token, browser.token) == (False, False, True)


async def test_a_realm_that_everybody_may_read(secret_file: str) -> None:
    """Who shows a token for something else is not shut out from what strangers may."""
    realm = make_realm(by_secret(secret_file, subscribe="open"))
    assert realm.open_to_read
    assert may(realm.recognise(shows(token(publish=("b",))), None, NOW), "subscribe", "anything")
    with pytest.raises(Unauthorized):
        realm.recognise(NOBODY, None, NOW)


GOOD, OTHER = token("a"), token("b")


@pytest.mark.parametrize(
    ("sender", "url", "channel"),
    [
        (Sender(key=GOOD), None, "a"),
        (Sender(key=GOOD), OTHER, "a"),
        (Sender(key=GOOD, cookies=f"pushup_token={OTHER}"), OTHER, "a"),
        (Sender(), GOOD, "a"),
        (Sender(cookies=f"pushup_token={OTHER}"), GOOD, "a"),
        (Sender(cookies=f"pushup_token={GOOD}"), None, "a"),
        (Sender(cookies=f"x=1; pushup_token={GOOD}; pushup_token={OTHER}"), None, "a"),
        (Sender(cookies=f"Pushup_Token={OTHER};pushup_token={GOOD}"), None, "a"),
    ],
)
async def test_which_credentials_count(sender: Sender, url: str | None, channel: str, secret_file: str) -> None:
    """The header before the URL before the cookie, and the first cookie of the name."""
    grant = make_realm(by_secret(secret_file)).recognise(sender, url, NOW)
    assert [name for name in ("a", "b") if may(grant, "subscribe", name)] == [channel]


@pytest.mark.parametrize(
    ("sender", "url"),
    [
        (NOBODY, None),
        (NOBODY, ""),
        (NOBODY, "x"),
        (Sender(key=""), None),
        (Sender(key="x"), None),
        (Sender(key=""), GOOD),
        (Sender(key="x"), GOOD),
        (Sender(key="", cookies=f"pushup_token={GOOD}"), None),
        (Sender(), "x"),
        (Sender(cookies=f"pushup_token={GOOD}"), "x"),
        (Sender(cookies=f"pushup_token={GOOD}"), ""),
        (Sender(cookies="pushup_token="), None),
        (Sender(cookies="pushup_token"), None),
        (Sender(cookies=f'pushup_token="{GOOD}"'), None),
        (Sender(cookies=f"xpushup_token={GOOD}"), None),
        (Sender(cookies=f"pushup_token ={GOOD}"), None),
        (Sender(cookies=f"other={GOOD}"), None),
        (Sender(key=hash_key(BACKEND)), None),
        (Sender(key="backend"), None),
        (Sender(key=BACKEND + "\udcff"), None),
        (Sender(key="\udcff" * 100), None),
    ],
)
async def test_whom_it_does_not_know(sender: Sender, url: str | None, secret_file: str) -> None:
    """Credentials that are wrong are not made good by others that come along."""
    realm = make_realm(by_secret(secret_file))
    with pytest.raises(Unauthorized) as caught:
        realm.recognise(sender, url, NOW)
    said = "this needs credentials: a key or a token, as `Authorization: Bearer ...`"
    showed = sender.key is not None or url is not None or sender.cookies
    assert caught.value.detail == (NOT_GOOD if showed else said)
    assert not realm._grants


async def test_the_cookie_has_the_name_of_the_rules(secret_file: str) -> None:
    """Another application's cookie is not looked at."""
    realm = make_realm(RealmRules(tokens=TokenRules(secret_file=secret_file, cookie="session")))
    assert may(realm.recognise(Sender(cookies=f"session={GOOD}"), None, NOW), "subscribe", "a")
    with pytest.raises(Unauthorized):
        realm.recognise(Sender(cookies=f"pushup_token={GOOD}"), None, NOW)


async def test_a_realm_without_tokens() -> None:
    """It has no cookie, and a token is good for nothing."""
    realm = make_realm(RealmRules(subscribe="open", keys=KEYS))
    assert may(realm.recognise(shows(BACKEND), None, NOW), "publish", "news")
    for sender, url in ((shows(GOOD), None), (NOBODY, GOOD), (Sender(cookies=f"pushup_token={GOOD}"), None)):
        with pytest.raises(Unauthorized):
            realm.recognise(sender, url, NOW)


async def test_a_realm_with_rules_but_nobody_who_may() -> None:
    """Nobody may publish."""
    realm = make_realm(RealmRules(subscribe="open"))
    with pytest.raises(Unauthorized):
        realm.recognise(shows(BACKEND), None, NOW)


# What is remembered


async def test_a_token_is_verified_once(secret_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After that it is known by its text; another text is verified."""
    realm = make_realm(by_secret(secret_file))
    assert realm.tokens is not None
    verified = []
    verify = realm.tokens.verify

    def count(token: str, now: float) -> Claims:
        verified.append(token)
        return verify(token, now)

    monkeypatch.setattr(realm.tokens, "verify", count)
    grants = [realm.recognise(shows(each), None, NOW) for each in (GOOD, GOOD, OTHER, GOOD)]
    assert verified == [GOOD, OTHER]
    assert grants[0] is grants[1] is grants[3]


@pytest.mark.parametrize("leeway", [0.0, 5.0])
async def test_a_remembered_token_expires(leeway: float, secret_file: str) -> None:
    """At the same moment as one that is not remembered, and is told so ever after."""
    realm = make_realm(RealmRules(tokens=TokenRules(secret_file=secret_file, leeway=leeway)))
    end = NOW + 60 + leeway
    assert realm.recognise(shows(GOOD), None, NOW).expires == end
    assert may(realm.recognise(shows(GOOD), None, end - 0.001), "subscribe", "a")
    for now in (end, end, end + 1, end + 1e6):
        with pytest.raises(TokenExpired):
            realm.recognise(shows(GOOD), None, now)
    assert not realm._grants


async def test_what_is_remembered_is_bounded(secret_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens there are; and who was forgotten is known again."""
    monkeypatch.setattr(pushup.realm, "GRANTS_MAX", 10)
    realm = make_realm(by_secret(secret_file))
    for number in range(35):
        realm.recognise(shows(token(number + 1)), None, NOW)
        assert may(realm.recognise(shows(GOOD), None, NOW), "subscribe", "a")
        assert len(realm._grants) <= 10
        assert len(realm._holders) <= 10


async def test_strangers_are_not_remembered(secret_file: str) -> None:
    """Nobody fills the memory with what is no good."""
    realm = make_realm(by_secret(secret_file))
    for number in range(100):
        with pytest.raises(Unauthorized):
            realm.recognise(shows(f"{GOOD}{number}"), None, NOW)
    assert not realm._grants
    assert not realm._holders


async def test_new_rules_hold_at_once(secret_file: str) -> None:
    """What was remembered under the old ones is forgotten: keys, tokens, cookies, and whether anybody is asked."""
    realm = make_realm(by_secret(secret_file))
    for secret in (BACKEND, READER, GOOD):
        realm.recognise(shows(secret), None, NOW)
    new = make_key()
    use(realm, RealmRules(keys=(KeyRules(name="backend", hash=hash_key(new), actions=("subscribe",)),)))
    for secret in (BACKEND, READER, GOOD):
        with pytest.raises(Unauthorized):
            realm.recognise(shows(secret), None, NOW)
    assert may(realm.recognise(shows(new), None, NOW), "subscribe", "a")
    assert not may(realm.recognise(shows(new), None, NOW), "publish", "news")
    use(realm, None)
    assert realm.recognise(NOBODY, None, NOW) is OPEN
    use(realm, by_secret(secret_file))
    with pytest.raises(Unauthorized):
        realm.recognise(NOBODY, None, NOW)


async def test_a_key_that_may_less_from_now_on() -> None:
    """Its name and its secret are the same, its grant is another."""
    realm = make_realm(RealmRules(subscribe="open", keys=KEYS))
    before = realm.recognise(shows(BACKEND), None, NOW)
    fewer = KeyRules(name="backend", hash=hash_key(BACKEND), actions=("publish",), channels=("news",))
    use(realm, RealmRules(subscribe="open", keys=(fewer,)))
    after = realm.recognise(shows(BACKEND), None, NOW)
    assert may(before, "manage", "news")
    assert not may(after, "manage", "news")
    assert not may(after, "publish", "orders.1")


# What is counted


def sit(grant: Grant) -> Seat:
    """Have a poll of this grant wait."""
    return Seat(Peers(10), grant, None)


async def test_as_many_polls_as_a_token_may_have(secret_file: str) -> None:
    """One more is refused until one has left."""
    realm = make_realm(by_secret(secret_file), polls_per_token_max=2)
    grant = realm.recognise(shows(GOOD), None, NOW)
    realm.admit(grant, ["a"])
    seats = [sit(grant), sit(grant)]
    with pytest.raises(TooManyPolls, match="2 polls wait with this token already"):
        realm.admit(grant, ["a"])
    seats.pop().leave()
    realm.admit(grant, ["a"])


async def test_a_poll_for_what_is_forbidden(secret_file: str) -> None:
    """One channel of several is enough, and is the one that is named."""
    realm = make_realm(by_secret(secret_file))
    grant = realm.recognise(shows(token("a", "b.*", 17)), None, NOW)
    realm.admit(grant, ["a", "b.1", "17"])
    with pytest.raises(Forbidden) as caught:
        realm.admit(grant, ["a", "b", "18"])
    assert caught.value.members == {"channel": "b"}
    with pytest.raises(Forbidden) as caught:
        realm.admit(grant, ["18"])
    assert caught.value.members == {"channel": 18}


async def test_a_key_may_have_any_number_of_polls() -> None:
    """The limit is for what browsers have."""
    realm = make_realm(RealmRules(keys=KEYS), polls_per_token_max=1)
    grant = realm.recognise(shows(READER), None, NOW)
    for _ in range(3):
        realm.admit(grant, ["a"])
        sit(grant)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"sub": "42"}, {"sub": "42", "exp": NOW + 61}, True),
        ({"sub": "42"}, {"sub": "43"}, False),
        ({"sub": "42"}, {}, False),
        ({}, {"exp": NOW + 61}, False),
        ({"sub": ""}, {"sub": "", "exp": NOW + 61}, True),
    ],
)
async def test_tokens_of_one_subject_share_limits(one: Any, two: Any, same: bool, secret_file: str) -> None:
    """Who gets himself a second token is the same; who says nothing is known by his token."""
    realm = make_realm(by_secret(secret_file), polls_per_token_max=1)
    first, second = (realm.recognise(shows(token("a", **claims)), None, NOW) for claims in (one, two))
    seat = sit(first)
    if same:
        with pytest.raises(TooManyPolls):
            realm.admit(second, ["a"])
    else:
        realm.admit(second, ["a"])
    seat.leave()
    realm.admit(second, ["a"])


async def test_one_token_with_two_signatures_is_one_token(tmp_path: Any) -> None:
    """ECDSA signs the same in as many ways as one likes, and its limits are the same."""
    file = tmp_path / "public.pem"
    file.write_bytes(public_pem(ec_key()))
    realm = make_realm(RealmRules(tokens=TokenRules(public_key_file=str(file))), polls_per_token_max=1)
    claims = {"exp": NOW + 60, "pushup": {"subscribe": ["a"]}}
    one, two = (realm.recognise(shows(make_token(claims, es256(ec_key()), "ES256")), None, NOW) for _ in range(2))
    assert one is not two
    sit(one)
    with pytest.raises(TooManyPolls):
        realm.admit(two, ["a"])


async def test_a_padded_signature_is_the_same_token(secret_file: str) -> None:
    """A token that is taken in another spelling has its limits, too."""
    realm = make_realm(by_secret(secret_file), polls_per_token_max=1)
    sit(realm.recognise(shows(GOOD), None, NOW))
    try:
        other = realm.recognise(shows(GOOD + "="), None, NOW)
    except Unauthorized:
        return
    with pytest.raises(TooManyPolls):
        realm.admit(other, ["a"])


async def test_subjects_and_names_of_keys_are_not_mixed_up(secret_file: str) -> None:
    """A token cannot use up what a key may by having its name as subject."""
    realm = make_realm(by_secret(secret_file), token_publish_rate_max=1, publish_rate_max=1)
    for subject in ("backend", "key backend", "token x"):
        realm.charge(realm.recognise(shows(token("a", sub=subject)), None, NOW), 1000)
    realm.charge(realm.recognise(shows(BACKEND), None, NOW), 1)


async def test_publications_are_charged(secret_file: str) -> None:
    """Keys and tokens each at their own rate; one batch may be larger, and is paid for afterwards."""
    realm = make_realm(by_secret(secret_file), publish_rate_max=100, token_publish_rate_max=1)
    key, browser = realm.recognise(shows(BACKEND), None, NOW), realm.recognise(shows(GOOD), None, NOW)
    realm.charge(key, 100_000)
    with pytest.raises(TooManyPublications) as caught:
        realm.charge(key, 1)
    assert 990 < caught.value.members["retry_after"] <= 1000
    realm.charge(browser, 60)
    with pytest.raises(TooManyPublications) as caught:
        realm.charge(browser, 1)
    assert 55 < caught.value.members["retry_after"] <= 60


async def test_who_is_known_again_has_what_is_left_of_his_limits(
    secret_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a poll of his waits, to be forgotten resets nothing."""
    monkeypatch.setattr(pushup.realm, "GRANTS_MAX", 1)
    realm = make_realm(by_secret(secret_file), token_publish_rate_max=1)
    grant = realm.recognise(shows(GOOD), None, NOW)
    seat = sit(grant)
    realm.charge(grant, 1000)
    realm.recognise(shows(OTHER), None, NOW)
    again = realm.recognise(shows(GOOD), None, NOW)
    assert again is not grant
    with pytest.raises(TooManyPublications):
        realm.charge(again, 1)
    seat.leave()


async def test_where_access_is_open_nothing_is_counted() -> None:
    """There is nobody to count it of."""
    realm = make_realm(None, publish_rate_max=1, polls_per_token_max=1)
    for _ in range(3):
        realm.charge(OPEN, 1000)
        realm.admit(OPEN, ["a"])
        sit(OPEN)


async def test_seats_that_are_left_balance() -> None:
    """What waits is counted while it waits."""
    realm = make_realm(RealmRules(keys=KEYS))
    grant = realm.recognise(shows(READER), None, NOW)
    assert grant.holder is not None
    seats = [sit(grant) for _ in range(5)]
    assert grant.holder.parked == 5
    for seat in seats:
        seat.leave()
    assert grant.holder.parked == 0


# Key sets


@asynccontextmanager
async def realm_by_url(*keys: Any) -> AsyncIterator[tuple[Realm, Any]]:
    """A realm whose tokens are by a key set behind a URL, and the server there."""
    async with key_server() as server:
        server.publish(*keys)
        realm = make_realm(RealmRules(keys=KEYS, tokens=TokenRules(jwks_url=server.url, audience="push")))
        try:
            yield realm, server
        finally:
            assert realm.tokens is not None
            if realm.tokens.jwks is not None:
                await realm.tokens.jwks.stop()


async def test_many_tokens_wait_for_one_key_set() -> None:
    """Whoever comes while it is being fetched is let in by it, not sent away."""
    async with realm_by_url(ed_jwk(ed_key(), "a")) as (realm, server):
        with pytest.raises(KeysNeeded):
            realm.recognise(shows(token_by(ed_key(), "a")), None, NOW)
        tokens = [token_by(ed_key(), "a", sub=str(number)) for number in range(20)]
        grants = await asyncio.gather(*(realm.meet(shows(each), None, NOW) for each in tokens))
        assert all(may(grant, "subscribe", "news") for grant in grants)
        assert server.requests == 1


async def test_keys_do_not_wait_for_the_key_set() -> None:
    """A back end goes on while the key set cannot be had."""
    async with realm_by_url() as (realm, server):
        server.stall()
        waiting = asyncio.create_task(realm.meet(shows(token_by(ed_key(), "a")), None, NOW))
        await eventually(lambda: server.requests == 1, "the key set is asked for")
        assert may(await realm.meet(shows(BACKEND), None, NOW), "publish", "news")
        server.released.set()
        with pytest.raises(Unavailable):
            await waiting


async def test_a_remembered_token_of_a_key_that_was_taken_out() -> None:
    """It is refused after the next fetch."""
    async with realm_by_url(ed_jwk(ed_key(), "a")) as (realm, server):
        old = shows(token_by(ed_key(), "a"))
        assert await realm.meet(old, None, NOW) is realm.recognise(old, None, NOW + 1)
        server.publish(ed_jwk(ed_key("b"), "b"))
        new = shows(token_by(ed_key("b"), "b"))
        assert may(await realm.meet(new, None, NOW + JWKS_PAUSE_S), "subscribe", "news")
        with pytest.raises(Unauthorized):
            realm.recognise(old, None, NOW + JWKS_PAUSE_S)
        with pytest.raises(Unauthorized):
            await realm.meet(old, None, NOW + JWKS_PAUSE_S)


async def test_a_remembered_token_of_a_key_set_that_was_kept_too_long() -> None:
    """As if it were shown for the first time: it cannot be judged."""
    async with realm_by_url(ed_jwk(ed_key(), "a")) as (realm, server):
        sender = shows(token_by(ed_key(), "a"))
        await realm.meet(sender, None, NOW)
        server.serve(b"", status=500)
        assert realm.tokens is not None
        assert realm.tokens.jwks is not None
        later = NOW + JWKS_KEPT_S + 1
        await realm.tokens.jwks.fetch(later)
        with pytest.raises(Unavailable):
            await realm.meet(sender, None, later)


async def test_new_rules_with_the_same_url_keep_the_key_set() -> None:
    """A reload asks nobody for what is known, and forgets what was remembered."""
    async with realm_by_url(ed_jwk(ed_key(), "a")) as (realm, server):
        sender = shows(token_by(ed_key(), "a"))
        before = await realm.meet(sender, None, NOW)
        use(realm, RealmRules(tokens=TokenRules(jwks_url=server.url, audience="push")))
        assert realm.recognise(sender, None, NOW) is not before
        use(realm, RealmRules(tokens=TokenRules(jwks_url=server.url, audience="other")))
        with pytest.raises(Unauthorized):
            realm.recognise(sender, None, NOW)
        assert server.requests == 1


async def test_a_key_that_is_taken_out_after_a_reload() -> None:
    """The key set tells the realm, whose it still is."""
    async with realm_by_url(ed_jwk(ed_key(), "a")) as (realm, server):
        sender = shows(token_by(ed_key(), "a"))
        await realm.meet(sender, None, NOW)
        use(realm, RealmRules(tokens=TokenRules(jwks_url=server.url, audience="push")))
        realm.recognise(sender, None, NOW)
        server.publish(ed_jwk(ed_key("b"), "b"))
        assert realm.tokens is not None
        assert realm.tokens.jwks is not None
        await realm.tokens.jwks.fetch(NOW + JWKS_PAUSE_S)
        with pytest.raises(Unauthorized):
            realm.recognise(sender, None, NOW + JWKS_PAUSE_S)


@pytest.mark.parametrize("after", ["other url", "no tokens", "open"])
async def test_new_rules_while_a_key_set_is_fetched(after: str) -> None:
    """Who waited is judged by the new ones."""
    async with key_server() as second, realm_by_url(ed_jwk(ed_key(), "a")) as (realm, server):
        server.stall()
        waiting = asyncio.create_task(realm.meet(shows(token_by(ed_key(), "a")), None, NOW))
        await eventually(lambda: server.requests == 1, "the key set is asked for")
        old = realm.tokens
        if after == "other url":
            use(realm, RealmRules(tokens=TokenRules(jwks_url=second.url, audience="push")))
        elif after == "no tokens":
            use(realm, RealmRules(keys=KEYS))
        else:
            use(realm, None)
        server.released.set()
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        assert type(result) is {"other url": Unavailable, "no tokens": Unauthorized, "open": Grant}[after]
        assert second.requests == 0
        realm.tokens = old


async def test_nothing_of_credentials_is_logged(secret_file: str, caplog: pytest.LogCaptureFixture) -> None:
    """Good ones or bad ones, at any level."""
    caplog.set_level(logging.DEBUG)
    realm = make_realm(by_secret(secret_file))
    shown = [BACKEND, GOOD, GOOD[:-3], BACKEND[:-3], token("a", exp=1)]
    said = []
    for secret in shown:
        try:
            realm.recognise(shows(secret), None, NOW)
        except Unauthorized as error:
            said.append(repr((error, error.problem())))
    assert len(said) == 3
    assert [secret for secret in shown if secret in caplog.text + "".join(said)] == []
    assert caplog.records, "the reasons are logged"
