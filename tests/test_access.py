"""Who may do what: patterns, grants, keys, and the file that says so."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushup.access import (
    ALL,
    KEY_PREFIX,
    NONE,
    OPEN,
    Action,
    Grant,
    KeyRules,
    Keys,
    Patterns,
    RealmRules,
    TokenRules,
    hash_key,
    make_key,
    parse_access,
)
from pushup.errors import Forbidden, SettingsError
from pushup.messages import MAX_ID

HASH = hash_key("pushup_secret")
ACTIONS: Sequence[Action] = ("subscribe", "publish", "manage")

letters = st.text("ab.*1", min_size=1, max_size=5)
names = st.text("ab.1", min_size=1, max_size=6)


def matches(pattern: str, channel: str) -> bool:
    """What a pattern means, said by another engine."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), channel, re.DOTALL) is not None


# Patterns


@given(patterns=st.lists(letters, max_size=5), channel=names)
def test_patterns_cover_what_a_naive_matcher_does(patterns: list[str], channel: str) -> None:
    """A star at the end stands for anything, and all else for itself."""
    good = [each for each in patterns if "*" not in each[:-1] and each not in (".", "..") and not each.startswith("0")]
    assert Patterns(good).covers(channel) == any(matches(each, channel) for each in good)


@given(pattern=letters.filter(lambda pattern: "*" in pattern[:-1]))
def test_a_star_is_only_at_the_end(pattern: str) -> None:
    """A star within would look as if it meant something."""
    with pytest.raises(ValueError, match=re.escape(f"the channel pattern {pattern!r} has a star that is not its end")):
        Patterns([pattern])


@given(channel=names, pattern=letters)
def test_one_pattern_more_never_takes_a_channel_away(channel: str, pattern: str) -> None:
    """Patterns only add."""
    before = Patterns(["a*", "b"])
    try:
        after = Patterns(["a*", "b", pattern])
    except ValueError:
        return
    assert after.covers(channel) >= before.covers(channel)


@pytest.mark.parametrize(
    ("pattern", "covered", "left_out"),
    [
        ("news", ["news"], ["New", "news.", "new", "NEWS", "newss", "*", "news*"]),
        ("news.*", ["news.", "news.a", "news.a.b", "news.*"], ["news", "newsa", "old.news.a", "News.a", "NEWS.A"]),
        ("*", ["a", "1", "*", "\u2603", "a b"], []),
        (17, ["17"], ["1", "170", "017", "7"]),
        ("17", ["17"], ["1", "170"]),
        ("1*", ["1", "17", "1a"], ["2", "21"]),
        (MAX_ID, [str(MAX_ID)], ["9"]),
        ("a/b", ["a/b"], ["a", "b", "a%2Fb"]),
        ("caf\u00e9", ["caf\u00e9"], ["cafe\u0301", "cafe"]),
        ("[ab]?", ["[ab]?"], ["a", "ab", "b1"]),
        ("a.c", ["a.c"], ["abc"]),
    ],
)
def test_what_a_pattern_covers(pattern: str | int, covered: list[str], left_out: list[str]) -> None:
    """Names are compared character by character; nothing but the star is special."""
    patterns = Patterns([pattern])
    assert [channel for channel in covered + left_out if patterns.covers(channel)] == covered


@pytest.mark.parametrize(
    "pattern",
    ["", ".", "..", "a\nb", "a\0", "x" * 256, "0", "01", 0, -1, MAX_ID + 1, True, "\ud800", "**", "*a", "a**"],
)
def test_a_pattern_that_names_no_channel(pattern: str | int) -> None:
    """What can never match is somebody's mistake, and the sentence shows the pattern."""
    with pytest.raises(ValueError, match="the channel pattern") as caught:
        Patterns([pattern])
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize(
    ("patterns", "everything"), [(["*"], True), (["a", "*"], True), (["a*", "b*"], False), ([], False), (["a"], False)]
)
def test_whether_no_channel_is_left_out(patterns: list[str], everything: bool) -> None:
    """Only the star alone says so."""
    assert Patterns(patterns).everything is everything


def test_no_patterns_cover_nothing() -> None:
    """An empty list is not a wildcard."""
    assert not Patterns([]).covers("a")
    assert not NONE.covers("*")


# Grants


@given(
    patterns=st.dictionaries(st.sampled_from(ACTIONS), st.lists(st.sampled_from(["a", "b.*", "*", "1"]))),
    action=st.sampled_from(ACTIONS),
    channels=st.lists(st.sampled_from(["a", "b.1", "b", "1", "c"]), max_size=4),
)
def test_a_grant_is_asked_for_every_channel(
    patterns: dict[Action, list[str]], action: Action, channels: list[str]
) -> None:
    """It lets through exactly those whose channels are all covered for that action, whatever it says of others."""
    refused = [name for name in channels if not any(matches(each, name) for each in patterns.get(action, []))]
    grant = Grant({each: Patterns(value) for each, value in patterns.items()})
    if refused:
        with pytest.raises(Forbidden) as caught:
            grant.check(action, channels)
        assert str(caught.value.members["channel"]) == refused[0]
        assert caught.value.detail == f"these credentials may not {action} here"
    else:
        grant.check(action, channels)


@pytest.mark.parametrize("action", ACTIONS)
def test_what_concerns_all_channels_needs_all_channels(action: Action) -> None:
    """A listing or a new integer channel is no matter of a pattern that leaves something out."""
    Grant({action: ALL}).check_all(action)
    for patterns in (NONE, Patterns(["a*", "b*"])):
        with pytest.raises(Forbidden, match=f"these credentials may not {action} all channels"):
            Grant({action: patterns}).check_all(action)


def test_where_access_is_open() -> None:
    """Everybody may do everything, nobody is counted, and it never ends."""
    for action in ACTIONS:
        OPEN.check(action, ["a", "1"])
        OPEN.check_all(action)
    assert OPEN.holder is None
    assert OPEN.expires == float("inf")


# Keys


def key_rules(name: str, key: str, **more: Any) -> KeyRules:
    return KeyRules(name=name, hash=hash_key(key), **more)


def test_a_key_is_random_and_says_what_it_is() -> None:
    """256 bits, in characters that need no quoting in a header, a URL or a shell."""
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(KEY_PREFIX + "[A-Za-z0-9_-]{43}", key) for key in keys)


def test_a_key_is_kept_as_its_hash() -> None:
    """SHA-256 of its bytes, as `sha256sum` would say."""
    assert hash_key("abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_several_keys_are_live_at_once() -> None:
    """While keys are being changed, the old and the new one are both good; afterwards only the new one."""
    old, new = make_key(), make_key()
    both = Keys([key_rules("old", old), key_rules("new", new)])
    assert [rules and rules.name for rules in map(both.find, (old, new))] == ["old", "new"]
    after = Keys([key_rules("new", new)])
    assert after.find(old) is None
    assert after.find(new) == key_rules("new", new)


def test_what_is_no_key() -> None:
    """Neither its hash, nor its name, nor nearly the key."""
    key = make_key()
    keys = Keys([key_rules("backend", key)])
    for wrong in (
        "",
        "backend",
        hash_key(key),
        key[:-1],
        key + "x",
        key.upper(),
        f" {key}",
        key.removeprefix(KEY_PREFIX),
    ):
        assert keys.find(wrong) is None, wrong


@given(shown=st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_whatever_is_shown_is_compared(shown: str) -> None:
    """Bytes that are no text are the key to nothing, and no error."""
    try:
        shown.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return  # No bytes can become that.
    assert Keys([key_rules("backend", make_key())]).find(shown) is None


@pytest.mark.parametrize("position", range(3))
def test_every_key_is_compared_in_constant_time(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a look takes tells neither how much of a key was right nor which key it was."""
    keys = [make_key() for _ in range(3)]
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    found = Keys([key_rules(str(number), key) for number, key in enumerate(keys)]).find(keys[position])
    assert found is not None
    assert found.name == str(position)
    assert compared == [(hash_key(key), hash_key(keys[position])) for key in keys]


def test_a_key_is_in_no_repr() -> None:
    """What is printed while somebody looks for a mistake holds no key."""
    key = make_key()
    rules = key_rules("backend", key)
    keys = Keys([rules])
    found = keys.find(key)
    assert key not in repr((keys, rules, found, vars(keys)))


# The access file


TOKENS = "[realms.default.tokens]\n"
OPEN_REALM = '[realms.default]\nsubscribe = "open"\n'
KEY = f'[[realms.default.keys]]\nname = "backend"\nhash = "{HASH}"\n'


def test_a_whole_access_file() -> None:
    """Everything that it can say."""
    text = f"""
        [realms.default]
        subscribe = "token"
        [[realms.default.keys]]
        name = "backend"
        hash = "{HASH}"
        actions = ["publish", "manage", "subscribe"]
        channels = ["news", "orders.*", 17]
        [realms.default.tokens]
        jwks_url = "https://example.com/jwks"
        issuer = "https://example.com"
        audience = "push"
        cookie = "session"
        publish = true
        leeway = 5
        [realms.default.settings]
        poll_timeout = 5
        [realms.two]
        subscribe = "open"
    """
    key = KeyRules(
        name="backend", hash=HASH, actions=("publish", "manage", "subscribe"), channels=("news", "orders.*", 17)
    )
    tokens = TokenRules(
        jwks_url="https://example.com/jwks",
        issuer="https://example.com",
        audience="push",
        cookie="session",
        publish=True,
        leeway=5.0,
    )
    assert parse_access(text, "access.toml") == {
        "default": RealmRules(subscribe="token", keys=(key,), tokens=tokens, settings={"poll_timeout": 5}),
        "two": RealmRules(subscribe="open"),
    }


def test_what_a_key_may_by_default() -> None:
    """A back end publishes and manages; it does not read."""
    (key,) = parse_access(OPEN_REALM + KEY, "access.toml")["default"].keys
    assert key.actions == ("publish", "manage")
    assert key.channels == ("*",)


@pytest.mark.parametrize("name", ["a", "A.b-c_d", "0", "x" * 64])
def test_names_of_realms(name: str) -> None:
    """Letters, digits, dots, dashes and underscores."""
    assert list(parse_access(f'[realms."{name}"]\nsubscribe = "open"', "access.toml")) == [name]


# The text, and what the error has to say beside the name of the file.
WRONG: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["realms"]),
    "no TOML": ("[realms", ["end of document"]),
    "realms is no table": ("realms = 1", ["realms", "object", "int"]),
    "a realm is no table": ("realms.default = 1", ["realms", "object", "int"]),
    "something beside realms": (f"{OPEN_REALM}[extra]", ["extra"]),
    "a misspelt member": (f'{OPEN_REALM}subscibe = "open"', ["'default'", "subscibe"]),
    "subscribe is neither": ('[realms.default]\nsubscribe = "all"', ["'default'", "subscribe"]),
    "nobody may subscribe": ("[realms.default]", ["'default'", "nobody may subscribe", "[realms.default.tokens]"]),
    "no key may subscribe": (KEY, ["'default'", "nobody may subscribe"]),
    "a key without a name": (f'{OPEN_REALM}[[realms.default.keys]]\nhash = "{HASH}"', ["'default'", "keys[0]", "name"]),
    "an empty name": (KEY.replace("backend", ""), ["'default'", "keys[0].name"]),
    "a long name": (KEY.replace("backend", "x" * 65), ["'default'", "keys[0].name"]),
    "a key without a hash": (f'{OPEN_REALM}[[realms.default.keys]]\nname = "a"', ["'default'", "keys[0]", "hash"]),
    "a short hash": (OPEN_REALM + KEY.replace(HASH, HASH[:-1]), ["'default'", "'backend'", "sha256:"]),
    "a hash and more": (OPEN_REALM + KEY.replace(HASH, HASH + "0"), ["'default'", "'backend'", "sha256:"]),
    "a hash and a line break": (OPEN_REALM + KEY.replace(HASH, HASH + "\\n"), ["'default'", "'backend'", "sha256:"]),
    "another hash": (OPEN_REALM + KEY.replace("sha256", "sha512"), ["'default'", "'backend'", "sha256:"]),
    "two keys of a name": (OPEN_REALM + KEY + KEY, ["'default'", "'backend'", "two keys"]),
    "an unknown action": (f'{OPEN_REALM}{KEY}actions = ["write"]', ["'default'", "keys[0].actions[0]", "write"]),
    "no actions": (f"{OPEN_REALM}{KEY}actions = []", ["'default'", "keys[0].actions"]),
    "a star within": (f'{OPEN_REALM}{KEY}channels = ["a", "b*c"]', ["'default'", "'backend'", "'b*c'"]),
    "a channel that cannot be": (f"{OPEN_REALM}{KEY}channels = [0]", ["'default'", "'backend'", "0"]),
    "a channel of another kind": (f"{OPEN_REALM}{KEY}channels = [true]", ["'default'", "channels[0]", "bool"]),
    "channels is no array": (f'{OPEN_REALM}{KEY}channels = "*"', ["'default'", "channels", "array"]),
    "tokens by nothing": (TOKENS, ["'default'", "secret_file, public_key_file and jwks_url"]),
    "tokens by two": (f'{TOKENS}secret_file = "a"\njwks_url = "b"', ["'default'", "exactly one"]),
    "a key set without an audience": (f'{TOKENS}jwks_url = "https://a.test"', ["'default'", "audience"]),
    "a cookie's name": (f'{TOKENS}secret_file = "a"\ncookie = "a;b"', ["'default'", "tokens.cookie"]),
    "negative leeway": (f'{TOKENS}secret_file = "a"\nleeway = -1', ["'default'", "tokens.leeway"]),
    "leeway that is no number": (f'{TOKENS}secret_file = "a"\nleeway = nan', ["'default'", "tokens.leeway"]),
    "endless leeway": (f'{TOKENS}secret_file = "a"\nleeway = inf', ["'default'", "tokens.leeway"]),
    "publish in words": (f'{TOKENS}secret_file = "a"\npublish = "no"', ["'default'", "tokens.publish"]),
    "an unknown member of tokens": (f'{TOKENS}secret_file = "a"\nalgorithm = "none"', ["'default'", "algorithm"]),
    "settings is no table": (f"{OPEN_REALM}settings = 1", ["'default'", "settings"]),
    "a realm's name": ('[realms."a/b"]\nsubscribe = "open"', ["'a/b'", "name"]),
    "an empty realm's name": ('[realms.""]\nsubscribe = "open"', ["''", "name"]),
    "a realm's name of dots": ('[realms.".."]\nsubscribe = "open"', ["'..'", "name"]),
    "a realm's name with a brace": ('[realms."a}"]\nsubscribe = "open"', ["'a}'", "name"]),
    "a realm's name and a line break": ('[realms."a\\n"]\nsubscribe = "open"', [r"'a\n'", "name"]),
    "a long realm's name": (f'[realms.{"x" * 65}]\nsubscribe = "open"', ["x" * 65, "name"]),
    "the second realm": (f'{OPEN_REALM}[realms.two]\nsubscribe = "all"', ["'two'", "subscribe"]),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_access_file(text: str, said: list[str]) -> None:
    """One sentence that names the file, the realm and what is wrong, in one line."""
    with pytest.raises(SettingsError) as caught:
        parse_access(text, "access.toml")
    assert caught.value.detail.startswith("the access file access.toml is wrong: ")
    assert "\n" not in caught.value.detail
    assert [part for part in said if part not in caught.value.detail] == []
    assert "'default'" in said or "default" not in caught.value.detail


@pytest.mark.parametrize(
    "line",
    [
        'hash = "{key}"',
        'hash = "sha256:{key}"',
        f'hash = "{HASH}"\nkey = "{{key}}"',
        f'hash = "{HASH}"\nchannels = "{{key}}"',
        'hash = "{key}',
        "hash = {key}",
        'hash = ["{key}"]',
    ],
)
def test_a_key_in_the_file_is_not_shown(line: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who puts the key where its hash belongs does not find it in a log as well."""
    caplog.set_level(logging.DEBUG)
    key = make_key()
    text = f'{OPEN_REALM}[[realms.default.keys]]\nname = "backend"\n{line.format(key=key)}\n'
    with pytest.raises(SettingsError) as caught:
        parse_access(text, "access.toml")
    assert key not in repr((caught.value, caught.value.problem(), caught.value.__cause__))
    assert key not in caplog.text


@given(text=st.text("realms.[]=\"'\n {}default01#", max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    """Whatever is in the file, it is rules or one error."""
    error = None
    try:
        parse_access(text, "access.toml")
    except SettingsError as caught:
        error = caught
    assert error is None or error.detail.startswith("the access file access.toml is wrong: ")
