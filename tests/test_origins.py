"""Which pages may use a node, and what they are told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushup.origins import PREFLIGHT_MAX_AGE_S, Origins

LISTED = "https://example.com, http://app.example.com:8443,http://[::1]:9"


@pytest.mark.parametrize(
    ("text", "origin", "allowed"),
    [
        (LISTED, "https://example.com", True),
        (LISTED, "http://app.example.com:8443", True),
        (LISTED, "http://[::1]:9", True),
        (LISTED, "http://example.com", False),
        (LISTED, "https://example.com:443", False),
        (LISTED, "https://example.com:8443", False),
        (LISTED, "https://sub.example.com", False),
        (LISTED, "https://example.com.evil.test", False),
        (LISTED, "https://evil.test/https://example.com", False),
        (LISTED, "https://example.com@evil.test", False),
        (LISTED, "https://example.com,https://evil.test", False),
        (LISTED, "https://example.com ", False),
        (LISTED, "HTTPS://EXAMPLE.COM", False),
        (LISTED, "null", False),
        (LISTED, "", False),
        (LISTED, "*", False),
        ("", "https://example.com", False),
        ("", "null", False),
        ("*", "https://anything.test", True),
        ("*", "null", True),
    ],
)
def test_an_origin_is_allowed_by_its_exact_name(text: str, origin: str, allowed: bool) -> None:
    """Scheme, host and port all count, and nothing is allowed that only looks alike; a star allows everything."""
    origins = Origins(text)

    assert origins.allows(origin, "node.test") is allowed
    assert ("Access-Control-Allow-Origin" in origins.headers(origin)) is allowed
    assert (origins.preflight(origin) is not None) is allowed


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://node.test", "node.test", True),
        ("https://node.test", "node.test", True),
        ("http://node.test:8080", "node.test:8080", True),
        ("http://node.test", "NODE.test", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("http://node.test:8080", "node.test", False),
        ("http://node.test", "node.test:8080", False),
        ("http://evil.test", "node.test", False),
        ("http://node.test.evil.test", "node.test", False),
        ("null", "node.test", False),
        ("null", "null", False),
        ("null", "", False),
        ("", "", False),
        ("http://", "", False),
        ("file://", "", False),
        ("node.test", "node.test", False),
    ],
)
@pytest.mark.parametrize("text", ["", LISTED])
def test_a_page_of_the_same_host_passes(text: str, origin: str, host: str, same: bool) -> None:
    """The page came from where its request goes, so there is nothing to protect; a page without an origin did not."""
    origins = Origins(text)

    assert origins.allows(origin, host) is origins.knows(origin, host) is same


def test_a_star_lets_everybody_in_but_knows_nobody() -> None:
    """With `*` any page may ask, but only as a stranger: without the cookies that the browser holds."""
    origins = Origins("*")

    assert origins.allows("https://evil.test", "node.test")
    assert not origins.knows("https://evil.test", "node.test")
    assert origins.headers("https://evil.test") == {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Expose-Headers": "Retry-After",
    }


def test_a_name_beside_the_star_is_known() -> None:
    """Who is named may come with cookies though everybody may come without."""
    origins = Origins("*, https://example.com")

    assert origins.headers("https://example.com")["Access-Control-Allow-Origin"] == "https://example.com"
    assert origins.headers("https://example.com")["Access-Control-Allow-Credentials"] == "true"
    assert "Access-Control-Allow-Credentials" not in origins.headers("https://evil.test")


def test_what_an_allowed_page_is_told() -> None:
    """Its own origin comes back, never another one, and caches are told that it depends on the asker."""
    assert Origins(LISTED).headers("https://example.com") == {
        "Access-Control-Allow-Origin": "https://example.com",
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": "Retry-After",
        "Vary": "Origin",
    }


@pytest.mark.parametrize(
    ("text", "origin", "headers"),
    [
        (LISTED, "https://evil.test", {"Vary": "Origin"}),
        (LISTED, None, {}),
        ("", "https://evil.test", {}),
        ("*", None, {}),
    ],
)
def test_others_are_told_nothing(text: str, origin: str | None, headers: dict[str, str]) -> None:
    """A page that is not allowed, and whoever is no page, gets no permission."""
    assert Origins(text).headers(origin) == headers


def test_a_preflight_names_all_that_the_api_takes() -> None:
    """The methods and header fields of the API, and how long the browser may remember that."""
    headers = Origins(LISTED).preflight("https://example.com")

    assert headers == {
        **Origins(LISTED).headers("https://example.com"),
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key",
        "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_S),
    }


@pytest.mark.parametrize(
    "text",
    [
        "example.com",
        "https://example.com/",
        "https://example.com/path",
        "https://Example.com",
        "HTTPS://example.com",
        "https://*.example.com",
        "https://user@example.com",
        "https://example.com:port",
        "https://example.com https://b.test",
        "https://exämple.com",
        "ftp://example.com",
        "null",
        "https://",
        "**",
        "https://a.test,,example.com",
        "https://a.test\nX: y",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    """What no browser would ever send as an origin is a mistake in the settings, and named."""
    with pytest.raises(ValueError, match="is not an origin, which is a scheme and a host"):
        Origins(text)


@pytest.mark.parametrize("text", ["", " ", ",", " , ,", "https://a.test,", "*,https://a.test"])
def test_blanks_and_commas_too_many_do_no_harm(text: str) -> None:
    """A list may be empty, and end with a comma."""
    assert Origins(text).allows("https://a.test", "") is ("a.test" in text)


@given(origin=st.text(max_size=60), host=st.text(max_size=30))
def test_nothing_but_the_listed_and_the_same_host_is_allowed(origin: str, host: str) -> None:
    """Whatever is sent as an origin, a permission is only ever for a listed name."""
    origins = Origins(LISTED)

    allowed = origins.headers(origin).get("Access-Control-Allow-Origin")

    assert allowed in (None, *LISTED.replace(" ", "").split(","))
    if origins.allows(origin, host) and allowed is None:
        assert host
        assert origin.endswith("://" + host.lower())
