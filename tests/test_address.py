"""Hosts and ports as people write them."""

import pytest

from pushup.address import Address, parse_address

ADDRESS = "it must be HOST:PORT, or [HOST]:PORT for IPv6"


@pytest.mark.parametrize(
    ("text", "address", "shown", "loopback"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080), "127.0.0.1:8080", True),
        ("127.9.9.9:0", Address("127.9.9.9", 0), "127.9.9.9:0", True),
        ("localhost:1", Address("localhost", 1), "localhost:1", True),
        ("[::1]:65535", Address("::1", 65535), "[::1]:65535", True),
        ("[0:0:0:0:0:0:0:1]:80", Address("::1", 80), "[::1]:80", True),
        (":80", Address("0.0.0.0", 80), "0.0.0.0:80", False),
        ("0.0.0.0:80", Address("0.0.0.0", 80), "0.0.0.0:80", False),
        ("[::]:80", Address("::", 80), "[::]:80", False),
        ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80), "[fe80::1%eth0]:80", False),
        ("my-host_1.example:80", Address("my-host_1.example", 80), "my-host_1.example:80", False),
        ("localhost.example:80", Address("localhost.example", 80), "localhost.example:80", False),
        ("127.0.0.1.example:80", Address("127.0.0.1.example", 80), "127.0.0.1.example:80", False),
    ],
)
def test_addresses(text: str, address: Address, shown: str, loopback: bool) -> None:
    """A host and a port; only what is certain to be this machine is."""
    assert parse_address(text) == address
    assert str(address) == shown
    assert address.loopback is loopback


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", ADDRESS),
        (":", ADDRESS),
        ("host:", ADDRESS),
        ("host:-1", ADDRESS),
        ("host: 80", ADDRESS),
        ("host:80\n", ADDRESS),
        ("host:８０", ADDRESS),
        ("::1:80", ADDRESS),
        ("host:80/path", ADDRESS),
        ("http://host:80", ADDRESS),
        ("me@host:80", ADDRESS),
        ("a b:80", ADDRESS),
        ("host:99999", "a port is at most 65535"),
        ("[::g]:80", "::g is not an IPv6 address"),
        ("[host]:80", "host is not an IPv6 address"),
    ],
)
def test_wrong_addresses(text: str, sentence: str) -> None:
    """Whatever is not just that is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_address(text)

    assert str(caught.value) == sentence
