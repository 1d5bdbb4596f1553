"""What a request's header fields say of its sender."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushup.origins import Origins
from pushup.peers import Networks
from pushup.sender import NOBODY, Sender, read_sender

PROXIES = Networks("10.0.0.0/8")
Fields = list[tuple[bytes, bytes]]


def read(*fields: tuple[bytes, bytes], origins: str = "https://page.test") -> Sender:
    return read_sender([(b"host", b"node.test"), *fields], Origins(origins), PROXIES)


@pytest.mark.parametrize(
    "fields", [[], [(b"host", b"node.test")], [(b"accept", b"*/*"), (b"x-forwarded-host", b"evil.test")]]
)
def test_who_says_nothing_is_nobody(fields: Fields) -> None:
    """Requests that say nothing of their sender share one, so that it costs nothing to remember."""
    assert read_sender(fields, Origins(""), PROXIES) is NOBODY


def test_nobody_has_nothing() -> None:
    """No key, no cookies, no proxy, no foreign page, no header fields."""
    assert (NOBODY.key, NOBODY.cookies, NOBODY.forwarded, NOBODY.foreign) == (None, "", None, False)
    assert (NOBODY.cors, NOBODY.cors_lines) == ({}, b"")


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"Bearer secret", "secret"),
        (b"bearer secret", "secret"),
        (b"BEARER   secret ", "secret"),
        (b"Bearer ", ""),
        (b"Bearer", ""),
        (b"Bearersecret", ""),
        (b"Basic c2VjcmV0", ""),
        (b"secret", ""),
        (b"", ""),
        (b"Bearer a b", "a b"),
        (b"Bearer k\xff", "k\udcff"),
        ("Bearer schlüssel".encode(), "schlüssel"),
    ],
)
def test_the_key_is_what_follows_bearer(value: bytes, key: str) -> None:
    """Anything else in Authorization is an empty key, which is good nowhere: it is not as if nothing was shown."""
    assert read((b"authorization", value)).key == key


def test_two_authorizations_are_none_to_be_believed() -> None:
    """Which of them a proxy before us looked at is not known."""
    assert read((b"authorization", b"Bearer a"), (b"authorization", b"Bearer a")).key == ""


def test_without_an_authorization_there_is_no_key() -> None:
    """That is another thing than a bad one: a token or a cookie may still come."""
    assert read((b"cookie", b"a=1")).key is None


@pytest.mark.parametrize(
    ("cookies", "value"),
    [
        ([b"token=1"], "1"),
        ([b"a=0; token=1; b=2"], "1"),
        ([b"a=0;token=1"], "1"),
        ([b"token=1; token=2"], "1"),
        ([b"a=0", b"token=1"], "1"),
        ([b"token=a=b=="], "a=b=="),
        ([b"token="], ""),
        ([b"token"], None),
        ([b"xtoken=1; Token=2; token2=3"], None),
        ([b""], None),
        ([b";;; ;"], None),
        ([b"token=\xff"], "\udcff"),
    ],
)
def test_a_cookie_is_found_by_its_exact_name(cookies: list[bytes], value: str | None) -> None:
    """The first of that name counts, in however many fields cookies come."""
    assert read(*[(b"cookie", each) for each in cookies]).cookie("token") == value


@pytest.mark.parametrize(
    ("origins", "origin", "kept"),
    [
        ("", None, True),
        ("", b"http://node.test", True),
        ("", b"https://evil.test", False),
        ("", b"null", False),
        ("https://page.test", b"https://page.test", True),
        ("https://page.test", b"https://evil.test", False),
        ("*", b"https://evil.test", False),
        ("*", b"null", False),
        ("*, https://page.test", b"https://page.test", True),
    ],
)
def test_cookies_count_only_with_a_page_that_is_known(origins: str, origin: bytes | None, kept: bool) -> None:
    """A browser sends cookies whatever page asks; a page that is only let in by a star must not act as their owner."""
    fields = [(b"cookie", b"token=1")] + ([(b"origin", origin)] if origin is not None else [])

    assert read(*fields, origins=origins).cookies == ("token=1" if kept else "")


@pytest.mark.parametrize(
    ("fields", "foreign"),
    [
        ([(b"origin", b"https://page.test")], False),
        ([(b"origin", b"https://node.test")], False),
        ([(b"origin", b"https://evil.test")], True),
        ([(b"origin", b"null")], True),
        ([(b"origin", b"")], True),
        ([(b"origin", b"https://page.test"), (b"origin", b"https://evil.test")], True),
        ([(b"origin", b"https://page.test"), (b"origin", b"https://page.test")], True),
        ([(b"origin", b"https://p\xffge.test")], True),
    ],
)
def test_a_page_of_another_origin_is_foreign(fields: Fields, foreign: bool) -> None:
    """A browser sends one Origin; of several none can be believed."""
    sender = read(*fields)

    assert sender.foreign is foreign
    assert ("Access-Control-Allow-Origin" in sender.cors) is (fields == [(b"origin", b"https://page.test")])


@pytest.mark.parametrize("origin", [b"null", b"", b"http://"])
@pytest.mark.parametrize("hosts", [[], [(b"host", b"")]])
def test_no_host_is_nobodys_host(origin: bytes, hosts: Fields) -> None:
    """An origin without a host is not that of a request without a Host."""
    assert read_sender([*hosts, (b"origin", origin)], Origins(""), PROXIES).foreign


def test_the_lines_are_the_header_fields() -> None:
    """The lane writes as bytes exactly what the web side sets."""
    sender = read((b"origin", b"https://page.test"))

    assert sender.cors_lines.decode() == "".join(f"{name}: {value}\r\n" for name, value in sender.cors.items())


@pytest.mark.parametrize(
    ("values", "forwarded"),
    [
        ([b"192.0.2.1"], "192.0.2.1"),
        ([b"203.0.113.9, 192.0.2.1, 10.1.1.1"], "192.0.2.1"),
        ([b"203.0.113.9", b"192.0.2.1"], "192.0.2.1"),
        ([b"2001:db8:1:2::7"], "2001:db8:1:2::/64"),
        ([b"unknown"], None),
        ([b""], None),
    ],
)
def test_the_client_a_proxy_speaks_for(values: list[bytes], forwarded: str | None) -> None:
    """It is read here and believed elsewhere, where the proxy is known."""
    assert read(*[(b"x-forwarded-for", value) for value in values]).forwarded == forwarded


FIELD = st.tuples(
    st.sampled_from([b"host", b"origin", b"cookie", b"authorization", b"x-forwarded-for", b"accept"]),
    st.one_of(
        st.binary(max_size=40).map(lambda value: value.translate(None, b"\r\n\x00")),
        st.sampled_from([b"https://page.test", b"node.test", b"null", b"Bearer k", b"token=1", b"10.0.0.1"]),
    ),
)


@given(fields=st.lists(FIELD, max_size=6), origins=st.sampled_from(["", "*", "https://page.test"]))
def test_whatever_comes_is_read_without_harm(fields: Fields, origins: str) -> None:
    """No field makes it fail, adds a line to an answer, or gives a foreign page the browser's cookies."""
    sender = read_sender(fields, Origins(origins), PROXIES)

    assert sender.cors_lines.count(b"\r\n") == len(sender.cors)
    assert not (sender.foreign and sender.cookies)
    assert not (sender.foreign and "Access-Control-Allow-Origin" in sender.cors)
    if sender.cors.get("Access-Control-Allow-Credentials"):
        assert origins == "https://page.test"
