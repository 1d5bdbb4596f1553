"""Peer addresses: networks, chains of proxies, PROXY headers, and how many connections an address has."""

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushup.peers import (
    HOPS_MAX,
    PROXY_V1_BYTES_MAX,
    Networks,
    Peers,
    Proxied,
    forwarded_for,
    parse_ip,
    parse_proxy_header,
    peer_key,
)

PROXIES = Networks("10.0.0.0/8, 2001:db8:ffff::/48, 192.0.2.7")


# Networks


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("10.0.0.0", True),
        ("10.255.255.255", True),
        ("11.0.0.0", False),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("::ffff:10.1.2.3", True),
        ("::ffff:0a01:0203", True),
        ("::ffff:11.1.2.3", False),
        ("::10.1.2.3", False),
        ("2001:db8:ffff::1", True),
        ("2001:DB8:FFFF:0::1", True),
        ("2001:db8:fffe::1", False),
        ("", False),
        ("localhost", False),
        ("10", False),
        ("10.1", False),
        ("0x0a.1.2.3", False),
        ("010.1.2.3", False),
        ("10.1.2.3 ", False),
        ("10.1.2.3/8", False),
        ("10.1.2.3%eth0", False),
        ("10.1.2.3:80", False),
        ("[10.1.2.3]", False),
        ("１0.1.2.3", False),
    ],
)
def test_an_address_is_in_a_network_or_not(host: str, inside: bool) -> None:
    """Only what is one address in its usual form is in a network, an IPv4 address also in its IPv6 form."""
    assert (host in PROXIES) is inside
    assert (host in PROXIES) is inside


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_an_empty_list_has_nobody(text: str) -> None:
    """No proxy at all is trusted then."""
    networks = Networks(text)

    assert "127.0.0.1" not in networks
    assert "::1" not in networks


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_in_every_form(host: str) -> None:
    """The default is whoever is on this machine."""
    assert host in Networks("127.0.0.0/8,::1")


@pytest.mark.parametrize(
    "text", ["proxy", "10.0.0.0/33", "10.0.0.1/8", "10.0.0.0-10.0.0.9", "10.*", "::1/129", "1.2.3"]
)
def test_a_list_with_nonsense_is_refused(text: str) -> None:
    """The part that is wrong is named."""
    with pytest.raises(ValueError, match=r"^\S+ is not an address or a network like 10.0.0.0/8$"):
        Networks(f"127.0.0.1, {text}")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::FFFF:192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("192.0.2.1%eth0", None),
        ("fe80::1%", None),
        ("192.0.2.256", None),
        ("1", None),
        ("", None),
    ],
)
def test_an_address_has_one_form(text: str, address: str | None) -> None:
    """However it is written; the interface beside a link-local address is no part of it."""
    parsed = parse_ip(text)

    assert (None if parsed is None else str(parsed)) == address


# X-Forwarded-For


@pytest.mark.parametrize(
    ("values", "client"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9, 10.0.0.1"], "203.0.113.9"),
        (["203.0.113.9, 10.0.0.1, 192.0.2.7"], "203.0.113.9"),
        (["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1, 203.0.113.9, 10.0.0.1"], "203.0.113.9"),
        (["10.0.0.1, 203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1", "203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1, 203.0.113.9", "10.0.0.1"], "203.0.113.9"),
        (["garbage, 203.0.113.9"], "203.0.113.9"),
        (["  203.0.113.9\t"], "203.0.113.9"),
        (["203.0.113.9,10.0.0.1"], "203.0.113.9"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["203.0.113.9:4711, 10.0.0.1:80"], "203.0.113.9"),
        (["[2001:db8::1]"], "2001:db8::1"),
        (["[2001:db8::1]:4711"], "2001:db8::1"),
        (["2001:db8::1"], "2001:db8::1"),
        (["2001:db8::1, [2001:db8:ffff::1]:80"], "2001:db8::1"),
        (["2001:DB8:0::1"], "2001:db8::1"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1, ::ffff:10.0.0.1"], "1.1.1.1"),
        (["fe80::1%eth0"], "fe80::1"),
    ],
)
def test_the_client_is_the_last_that_is_no_proxy(values: list[str], client: str) -> None:
    """What stands before is what the client said itself, and is not believed. An address has one form."""
    assert forwarded_for([value.encode() for value in values], PROXIES) == client


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b",",
        b"203.0.113.9,",
        b"203.0.113.9, unknown",
        b"203.0.113.9, _hidden",
        b"10.0.0.1",
        b"10.0.0.1, 192.0.2.7",
        b"garbage, 10.0.0.1",
        b"203.0.113.9 10.0.0.1",
        b"[2001:db8::1",
        b"[2001:db8::1]evil",
        b"[2001:db8::1]:port",
        b"[203.0.113.9",
        b"[]",
        b"[",
        b"203.0.113.9:port",
        b"203.0.113.9:",
        b"203.0.113.9%" + b"x" * 1000,
        b"2001:db8::1]",
        b":80",
        b"\xff\xfe",
        b"203.0.113.9\xa0",
        b'for="203.0.113.9"',
        b"\xb2\xb2.0.0.1",
    ],
)
def test_what_is_no_address_is_nobody(value: bytes) -> None:
    """No proxy writes such things of its client, so nothing in it is to be believed."""
    assert forwarded_for([value], PROXIES) is None


@pytest.mark.parametrize(("proxies", "client"), [(HOPS_MAX - 1, "203.0.113.9"), (HOPS_MAX, None), (4000, None)])
def test_a_chain_of_proxies_has_an_end(proxies: int, client: str | None) -> None:
    """Thousands of hops are no more work than a few: nobody has so many proxies of his own."""
    assert forwarded_for([b"203.0.113.9" + b",10.0.0.1" * proxies], PROXIES) == client


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_an_address_or_nobody(values: list[bytes]) -> None:
    """What comes out is one address in its usual form, and not a proxy's."""
    client = forwarded_for(values, PROXIES)

    assert client is None or (client == str(ip_address(client)) and client not in PROXIES)


@given(
    spoofed=st.lists(st.one_of(st.ip_addresses().map(str), st.text(",.:[]% abc0129", max_size=20)), max_size=4),
    client=st.ip_addresses().filter(lambda address: str(address) not in PROXIES),
    proxies=st.lists(
        st.sampled_from(["10.0.0.1", "192.0.2.7", "2001:db8:ffff::5", "[2001:db8:ffff::5]:1"]), max_size=3
    ),
)
def test_nothing_that_a_client_says_changes_who_it_is(spoofed: list[str], client: object, proxies: list[str]) -> None:
    """Whatever it sends as X-Forwarded-For, the first trusted proxy appends who it really is."""
    value = ", ".join([*spoofed, str(client), *proxies]).encode()

    assert forwarded_for([value], PROXIES) == str(parse_ip(str(client)))


# The PROXY protocol

V2 = b"\r\n\r\n\x00\r\nQUIT\n"
IPV4 = ip_address("203.0.113.9").packed + ip_address("10.0.0.1").packed + struct.pack("!HH", 4711, 80)
IPV6 = ip_address("2001:db8::1").packed + ip_address("2001:db8::2").packed + struct.pack("!HH", 4711, 80)
MAPPED = ip_address("::ffff:203.0.113.9").packed + ip_address("2001:db8::2").packed + struct.pack("!HH", 4711, 80)
UNIX = b"/run/a".ljust(108, b"\x00") + b"/run/b".ljust(108, b"\x00")
TLVS = b"\x01\x00\x08http/1.1" + b"\x04\x00\x03\x00\x00\x00"


def v2(kind: int, payload: bytes, *, command: int = 0x21) -> bytes:
    return V2 + struct.pack("!BBH", command, kind, len(payload)) + payload


HEADERS = {
    "v1, TCP4": (b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n", "203.0.113.9"),
    "v1, TCP6": (b"PROXY TCP6 2001:db8::1 2001:db8::2 4711 80\r\n", "2001:db8::1"),
    "v1, TCP6 in capitals": (b"PROXY TCP6 2001:DB8:0::1 ::2 4711 80\r\n", "2001:db8::1"),
    "v1, TCP6 with IPv4 in it": (b"PROXY TCP6 ::ffff:203.0.113.9 ::1 4711 80\r\n", "203.0.113.9"),
    "v1, UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "v1, UNKNOWN with more": (b"PROXY UNKNOWN ffff:f::f ffff::f 65535 65535\r\n", None),
    "v1, the longest": (b"PROXY UNKNOWN ".ljust(PROXY_V1_BYTES_MAX - 2, b"x") + b"\r\n", None),
    "v2, TCP4": (v2(0x11, IPV4), "203.0.113.9"),
    "v2, UDP4": (v2(0x12, IPV4), "203.0.113.9"),
    "v2, TCP6": (v2(0x21, IPV6), "2001:db8::1"),
    "v2, TCP6 with IPv4 in it": (v2(0x21, MAPPED), "203.0.113.9"),
    "v2, TLVs": (v2(0x11, IPV4 + TLVS), "203.0.113.9"),
    "v2, TCP6 and TLVs": (v2(0x21, IPV6 + TLVS), "2001:db8::1"),
    "v2, UNIX": (v2(0x31, UNIX), None),
    "v2, unspecified": (v2(0x00, b""), None),
    "v2, unspecified with more": (v2(0x00, b"anything"), None),
    "v2, LOCAL": (v2(0x00, b"", command=0x20), None),
    "v2, LOCAL with addresses": (v2(0x11, IPV4, command=0x20), None),
    "v2, LOCAL with TLVs": (v2(0x00, TLVS, command=0x20), None),
    "v2, the longest": (v2(0x11, IPV4.ljust(2048, b"\x00")), "203.0.113.9"),
}


@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n\r\n", b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n", b"\r\n"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_proxy_header_names_the_client(name: str, rest: bytes) -> None:
    """The client or nobody, and where its own bytes begin, whatever they are."""
    header, client = HEADERS[name]

    assert parse_proxy_header(header + rest) == Proxied(client, len(header))


@pytest.mark.parametrize("name", HEADERS)
def test_a_proxy_header_cut_anywhere_is_waited_for(name: str) -> None:
    """A header may come byte by byte, and says nothing before it is complete."""
    header, _ = HEADERS[name]

    assert [cut for cut in range(len(header)) if parse_proxy_header(header[:cut]) is not None] == []


@pytest.mark.parametrize(
    "data",
    [
        b"G",
        b"GET / HTTP/1.1\r\nHost: test\r\n\r\n",
        b"\r\n\r\nGET",
        b"proxy TCP4 203.0.113.9 10.0.0.1 4711 80\r\n",
        b" PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n",
        b"PROXY  TCP4 203.0.113.9 10.0.0.1 4711 80\r\n",
        b"PROXY TCP4  203.0.113.9 10.0.0.1 4711 80\r\n",
        b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80 \r\n",
        b"PROXY TCP4 203.0.113.9 10.0.0.1 4711\r\n",
        b"PROXY TCP4 203.0.113.9\r\n",
        b"PROXY TCP4 203.0.113.256 10.0.0.1 4711 80\r\n",
        b"PROXY TCP4 2001:db8::1 2001:db8::2 4711 80\r\n",
        b"PROXY TCP4 ::ffff:203.0.113.9 10.0.0.1 4711 80\r\n",
        b"PROXY TCP6 203.0.113.9 10.0.0.1 4711 80\r\n",
        b"PROXY TCP4 203.0.113.9 nonsense 4711 80\r\n",
        b"PROXY TCP4 203.0.113.9 10.0.0.1 -1 80\r\n",
        b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 123456\r\n",
        b"PROXY TCP5 203.0.113.9 10.0.0.1 4711 80\r\n",
        b"PROXY UDP4 203.0.113.9 10.0.0.1 4711 80\r\n",
        b"PROXY UNKNOWNX\r\n",
        b"PROXY unknown\r\n",
        b"PROXY \r\n",
        b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\n" + b"x" * PROXY_V1_BYTES_MAX,
        b"PROXY TCP4 203.0.113.9\n10.0.0.1 4711 80\r\n",
        b"PROXY UNKNOWN ".ljust(PROXY_V1_BYTES_MAX, b"x"),
        b"PROXY UNKNOWN ".ljust(PROXY_V1_BYTES_MAX - 1, b"x") + b"\r\n",
        b"PROXY UNKNOWN \xff\r\n",
        V2 + b"\x11\x11\x00\x0c" + IPV4,
        V2 + b"\x22\x11\x00\x0c" + IPV4,
        V2 + b"\x31\x11\x00\x0c" + IPV4,
        v2(0x11, IPV4[:-1]),
        v2(0x11, b""),
        v2(0x21, IPV4),
        v2(0x21, IPV6[:-1]),
        V2 + struct.pack("!BBH", 0x21, 0x11, 2049),
        V2 + struct.pack("!BBH", 0x21, 0x11, 65535),
        V2[:-1] + b"X",
    ],
)
def test_what_is_no_proxy_header_is_refused(data: bytes) -> None:
    """As soon as it cannot become one: a client must not be able to pass for a proxy's by being sloppy."""
    with pytest.raises(ValueError, match="PROXY header"):
        parse_proxy_header(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_header_or_not(data: bytes) -> None:
    """Nothing but ValueError is raised."""
    for start in (b"", b"PROXY ", b"PROXY TCP4 ", V2, V2 + b"\x21\x11\x00\x10"):
        try:
            proxied = parse_proxy_header(start + data)
        except ValueError:
            continue
        assert proxied is None or 0 < proxied.length <= len(start + data)


@given(client=st.ip_addresses(), proxy=st.ip_addresses(v=4), tlvs=st.binary(max_size=100))
def test_both_versions_name_the_same_client(client: object, proxy: object, tlvs: bytes) -> None:
    """An address is the same however it was told."""
    one = ip_address(str(client))
    if one.version == 4:
        text, packed, kind = f"PROXY TCP4 {one} {proxy} 1 2\r\n", one.packed + ip_address(str(proxy)).packed, 0x11
    else:
        text, packed, kind = f"PROXY TCP6 {one} ::1 1 2\r\n", one.packed + ip_address("::1").packed, 0x21
    first = parse_proxy_header(text.encode())
    second = parse_proxy_header(v2(kind, packed + b"\x00\x01\x00\x02" + tlvs))

    assert first is not None
    assert second is not None
    assert first.client == second.client == str(parse_ip(str(one)))


# Counting


def test_connections_are_counted_by_address() -> None:
    """One address has as many as the limit; another one is not affected."""
    clients = Peers(2)
    for host, over in (("192.0.2.1", False), ("192.0.2.1", False), ("192.0.2.1", True), ("192.0.2.2", False)):
        assert clients.is_over(clients.enter(host)) is over

    assert len(clients) == 2


def test_from_twice_the_limit_on_it_is_a_flood() -> None:
    """So many are not even told that they are too many."""
    clients = Peers(2)

    flooding = [clients.is_flooding(clients.enter("192.0.2.1")) for _ in range(6)]

    assert flooding == [False, False, False, False, True, True]


def test_who_leaves_makes_room_and_is_forgotten() -> None:
    """Nothing is kept of an address without connections."""
    clients = Peers(1)
    first, second = clients.enter("192.0.2.1"), clients.enter("192.0.2.1")
    assert clients.is_over(second)

    clients.leave(first)
    assert not clients.is_over(second)
    clients.leave(second)

    assert len(clients) == 0
    assert not clients.is_over(clients.enter("192.0.2.1"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", True),
        ("2001:db8:1:2::1", "2001:DB8:1:2:0::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::1", "127.0.0.1", False),
    ],
)
def test_an_ipv6_client_is_its_network(one: str, other: str, same: bool) -> None:
    """Whoever has an IPv6 address has 2^64 of them, so these count as one; IPv4 addresses count each for itself."""
    clients = Peers(1)
    clients.enter(one)

    assert clients.is_over(clients.enter(other)) is same


def test_a_refusal_names_address_and_limit() -> None:
    """It is 429, to be tried again."""
    clients = Peers(3)
    error = clients.refusal(clients.enter("2001:db8:1:2::1"))

    assert (error.status, error.code) == (429, "too_many_connections")
    assert error.detail == "2001:db8:1:2::/64 has 3 connections here already"
    assert int(error.headers["Retry-After"]) >= 1


@given(
    limit=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from(["192.0.2.1", "::1", "::2", "2001:db8::1"]), st.booleans()), max_size=60),
)
def test_counts_are_those_of_who_is_there(limit: int, steps: list[tuple[str, bool]]) -> None:
    """Whoever comes and goes, each count is that of the connections that are there."""
    clients = Peers(limit)
    there: dict[str, list[str]] = {}
    for host, comes in steps:
        key = "::" if host in ("::1", "::2") else host
        present = there.setdefault(key, [])
        if comes:
            client = clients.enter(host)
            present.append(client)
            assert clients.is_over(client) is (len(present) > limit)
        elif present:
            clients.leave(present.pop())
    assert len(clients) == sum(bool(present) for present in there.values())


@pytest.mark.parametrize("host", ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8:1:2::1", "fe80::1%eth0", "nonsense"])
def test_a_client_that_is_known_by_its_key_counts_with_the_others(host: str) -> None:
    """Whoever has found out the key before need not have the address looked at again."""
    clients = Peers(1)
    clients.count(peer_key(host))

    assert clients.is_over(clients.enter(host))
    assert peer_key(peer_key(host)) == peer_key(host)
