"""A broker's URL: every form of it, and what is said of wrong ones."""

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushup.address import Address
from pushup.redis_url import Servers, parse_servers

FORMS = "it must be redis://HOST:PORT, redis+sentinel://… or redis+cluster://…"
SECRET = "hush-hush"


def refusal(url: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_servers(url)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("redis://there", Servers("server", (Address("there", 6379),), "redis://there:6379")),
        ("redis://there:1/", Servers("server", (Address("there", 1),), "redis://there:1/")),
        (
            "redis://there:65535/15",
            Servers("server", (Address("there", 65535),), "redis://there:65535/15", "", {"db": 15}),
        ),
        ("redis://192.0.2.1", Servers("server", (Address("192.0.2.1", 6379),), "redis://192.0.2.1:6379")),
        ("rediss://there", Servers("server", (Address("there", 6379),), "rediss://there:6379", tls=True)),
        (
            "redis+sentinel://one,two:5,three/main",
            Servers(
                "sentinel",
                (Address("one", 26379), Address("two", 5), Address("three", 26379)),
                "redis+sentinel://one:26379,two:5,three:26379/main",
                "main",
            ),
        ),
        (
            "redis+sentinel://one/main/3",
            Servers("sentinel", (Address("one", 26379),), "redis+sentinel://one:26379/main/3", "main", {"db": 3}),
        ),
        (
            "rediss+sentinel://one/my%20%2Fmain",
            Servers(
                "sentinel", (Address("one", 26379),), "rediss+sentinel://one:26379/my%20%2Fmain", "my /main", tls=True
            ),
        ),
        (
            "redis+cluster://one,two:7",
            Servers("cluster", (Address("one", 6379), Address("two", 7)), "redis+cluster://one:6379,two:7"),
        ),
        (
            "rediss+cluster://one/",
            Servers("cluster", (Address("one", 6379),), "rediss+cluster://one:6379/", tls=True),
        ),
    ],
)
def test_forms(url: str, servers: Servers) -> None:
    """One server, Sentinels or a cluster, with the usual ports, the database and the service."""
    assert parse_servers(url) == servers


@pytest.mark.parametrize(
    ("url", "addresses", "shown"),
    [
        ("redis://[::1]", [Address("::1", 6379)], "redis://[::1]:6379"),
        ("redis://[2001:db8::1]:7/1", [Address("2001:db8::1", 7)], "redis://[2001:db8::1]:7/1"),
        (
            "redis+cluster://[::1]:7,[::2]",
            [Address("::1", 7), Address("::2", 6379)],
            "redis+cluster://[::1]:7,[::2]:6379",
        ),
    ],
)
def test_ipv6(url: str, addresses: list[Address], shown: str) -> None:
    """In brackets, with a port or without."""
    servers = parse_servers(url)

    assert (list(servers.addresses), servers.shown) == (addresses, shown)


@pytest.mark.parametrize(
    ("credentials", "username", "password"),
    [
        ("me:secret", "me", "secret"),
        (":secret", None, "secret"),
        ("me:", "me", ""),
        ("m%40e:se%3Ac%2Fr%40et%25", "m@e", "se:c/r@et%"),
        ("me:ge%C3%BCheim", "me", "geüheim"),
        ("me:se:c@r/e?t#+", "me", "se:c@r/e?t#+"),
    ],
)
@pytest.mark.parametrize("rest", ["redis://{}there", "redis+sentinel://{}one,two/main", "rediss+cluster://{}one,two"])
def test_users(rest: str, credentials: str, username: str | None, password: str) -> None:
    """User and password go to the servers that hold data, decoded; what is left out is not sent."""
    servers = parse_servers(rest.format(credentials + "@"))

    assert servers.options == {"username": username, "password": password}
    assert servers.sentinel_options == {}
    assert servers.shown == parse_servers(rest.format("")).shown


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("ssl_ca_certs=/a/ca.pem", {"ssl_ca_certs": "/a/ca.pem"}),
        (
            "ssl_ca_certs=%2Fa%20b&ssl_certfile=c&ssl_keyfile=k",
            {"ssl_ca_certs": "/a b", "ssl_certfile": "c", "ssl_keyfile": "k"},
        ),
        ("ssl_check_hostname=no", {"ssl_check_hostname": False}),
        ("ssl_check_hostname=False", {"ssl_check_hostname": False}),
        ("ssl_check_hostname=0", {"ssl_check_hostname": False}),
        ("ssl_check_hostname=yes", {"ssl_check_hostname": True}),
    ],
)
def test_tls_options(query: str, options: dict[str, Any]) -> None:
    """TLS is the same for the servers and for the Sentinels before them."""
    one = parse_servers(f"rediss://there?{query}")
    behind = parse_servers(f"rediss+sentinel://there/main?{query}")

    assert (one.options, one.tls) == (options, True)
    assert (behind.options, behind.sentinel_options, behind.tls) == (options, options, True)


def test_sentinels_have_users_of_their_own() -> None:
    """Apart from those of the servers, and not shown either."""
    servers = parse_servers("redis+sentinel://me:one@there/main?sentinel_username=watch%26er&sentinel_password=two%40")

    assert servers.options == {"username": "me", "password": "one"}
    assert servers.sentinel_options == {"username": "watch&er", "password": "two@"}
    assert servers.shown == "redis+sentinel://there:26379/main"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", FORMS),
        ("there:6379", FORMS),
        ("http://there", FORMS),
        ("REDIS://there", FORMS),
        ("redis:there", FORMS),
        ("redis+cloud://there", FORMS),
        ("redis://there#1", FORMS),
        ("redis://me@there", "a user needs a password: USER:PASSWORD@HOST, or :PASSWORD@HOST"),
        ("redis://@there", "a user needs a password: USER:PASSWORD@HOST, or :PASSWORD@HOST"),
        ("redis://", "'' is not HOST or HOST:PORT"),
        ("redis://:6379", "':6379' is not HOST or HOST:PORT"),
        ("redis://there:", "'there:' is not HOST or HOST:PORT"),
        ("redis://there:port", "'there:port' is not HOST or HOST:PORT"),
        ("redis://there:65536", "'there:65536' is not HOST or HOST:PORT"),
        ("redis://there:-1", "'there:-1' is not HOST or HOST:PORT"),
        ("redis://the re", "'the re' is not HOST or HOST:PORT"),
        ("redis://there\n", r"'there\n' is not HOST or HOST:PORT"),
        ("redis://::1", "'::1' is not HOST or HOST:PORT"),
        ("redis://[::1", "'[::1' is not HOST or HOST:PORT"),
        ("redis+cluster://one,,two", "'' is not HOST or HOST:PORT"),
        ("redis+cluster://one, two", "' two' is not HOST or HOST:PORT"),
        ("redis://one,two", "several servers are redis+sentinel:// or redis+cluster://"),
        ("redis+sentinel://one", "it must name Sentinel's service: redis+sentinel://HOST:PORT/SERVICE"),
        ("redis+sentinel://one/", "it must name Sentinel's service: redis+sentinel://HOST:PORT/SERVICE"),
        ("redis://there/x", "/x is not the number of a database"),
        ("redis://there/-1", "/-1 is not the number of a database"),
        ("redis://there/1/2", "/1/2 is not the number of a database"),
        ("redis+sentinel://there/main/x", "/x is not the number of a database"),
        ("redis+cluster://there/1", "/1 is not the number of a database"),
        ("redis://there?db=1", "db is not an option of such a URL"),
        ("redis://there?ssl_ca_certs=a", "ssl_ca_certs is not an option of such a URL"),
        ("rediss://there?sentinel_password=a", "sentinel_password is not an option of such a URL"),
        ("rediss+cluster://there?sentinel_username=a", "sentinel_username is not an option of such a URL"),
    ],
)
def test_wrong_urls(url: str, sentence: str) -> None:
    """The rest of a sentence says what is wrong."""
    assert refusal(url) == sentence


@given(before=st.text(max_size=5), after=st.text(max_size=5), behind=st.sampled_from(["", "+sentinel", "+cluster"]))
def test_a_password_survives_and_is_never_shown(before: str, after: str, behind: str) -> None:
    """Any password, percent-encoded, arrives as it was, and is in nothing that is shown."""
    password = before + SECRET + after
    path = "/main" if behind == "+sentinel" else ""

    servers = parse_servers(f"redis{behind}://me:{quote(password, safe='')}@there{path}")

    assert servers.options["password"] == password
    assert SECRET not in servers.shown


@pytest.mark.parametrize(
    "url",
    [
        f"redis://me:{SECRET}@there:99999",
        f"redis://me:{SECRET}@one,two",
        f"redis://me:{SECRET}@there/x",
        f"redis://me:{SECRET}@there?x=1",
        f"redis+sentinel://me:{SECRET}@there",
        f"redis+sentinel://there/main?password={SECRET}",
        f"redis+sentinel://there/main/x?sentinel_password={SECRET}",
        f"http://me:{SECRET}@there",
    ],
)
def test_a_password_is_in_no_error(url: str) -> None:
    """Errors end in logs."""
    assert SECRET not in refusal(url)
