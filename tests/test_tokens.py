"""Tokens: which are believed, what they say, and the key sets that they are signed with."""

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from pushup.access import NOT_GOOD, TokenRules
from pushup.errors import PushUpError, SettingsError, TokenExpired, Unauthorized, Unavailable
from pushup.tokens import (
    JWKS_BYTES_MAX,
    JWKS_FRESH_S,
    JWKS_KEPT_S,
    JWKS_PAUSE_S,
    Claims,
    Jwks,
    KeysNeeded,
    Tokens,
    parse_jwks,
)
from tests.support import eventually

NOW = 1_800_000_000.0
SECRET = b"0123456789abcdef0123456789abcdef"
PAYLOAD: Mapping[str, Any] = {"exp": NOW + 60, "pushup": {"subscribe": ["news", "user.42.*", 17]}}

Signer = Callable[[bytes], bytes]


# Signing by hand, so that a token can be wrong in any way.


def encode(part: Any) -> str:
    """One part of a token, of bytes or of what becomes JSON."""
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def make_token(payload: Any, sign: Signer, algorithm: Any = "HS256", **header: Any) -> str:
    """A token with that payload and header, signed as asked."""
    signed = f"{encode({'alg': algorithm, 'typ': 'JWT', **header})}.{encode(payload)}"
    return f"{signed}.{encode(sign(signed.encode()))}"


def hs256(secret: bytes = SECRET) -> Signer:
    return lambda data: hmac.new(secret, data, hashlib.sha256).digest()


def hs512(secret: bytes = SECRET) -> Signer:
    return lambda data: hmac.new(secret, data, hashlib.sha512).digest()


@cache
def rsa_key(name: str = "a", bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(name: str = "a", curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


@cache
def ed_key(name: str = "a") -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def rs256(key: rsa.RSAPrivateKey) -> Signer:
    return lambda data: key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def rs512(key: rsa.RSAPrivateKey) -> Signer:
    return lambda data: key.sign(data, padding.PKCS1v15(), hashes.SHA512())


def ps256(key: rsa.RSAPrivateKey) -> Signer:
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
    return lambda data: key.sign(data, pss, hashes.SHA256())


def es256(key: ec.EllipticCurvePrivateKey) -> Signer:
    def sign(data: bytes) -> bytes:
        size = (key.curve.key_size + 7) // 8
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(size) + s.to_bytes(size)

    return sign


def eddsa(key: ed25519.Ed25519PrivateKey) -> Signer:
    return key.sign


def public_pem(key: Any) -> bytes:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert isinstance(pem, bytes)
    return pem


def number(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8))


def rsa_jwk(key: rsa.RSAPrivateKey, kid: str | None = None, **more: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    named = {} if kid is None else {"kid": kid}
    return {"kty": "RSA", "n": number(public.n), "e": number(public.e), **named, **more}


def ec_jwk(key: ec.EllipticCurvePrivateKey, kid: str | None = None, **more: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    size = (key.curve.key_size + 7) // 8
    curve = {"secp256r1": "P-256", "secp384r1": "P-384"}[key.curve.name]
    named = {} if kid is None else {"kid": kid}
    x, y = encode(public.x.to_bytes(size)), encode(public.y.to_bytes(size))
    return {"kty": "EC", "crv": curve, "x": x, "y": y, **named, **more}


def ed_jwk(key: ed25519.Ed25519PrivateKey, kid: str | None = None, **more: Any) -> dict[str, Any]:
    x = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    named = {} if kid is None else {"kid": kid}
    return {"kty": "OKP", "crv": "Ed25519", "x": encode(x), **named, **more}


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that holds SECRET."""
    file = tmp_path_factory.mktemp("tokens") / "secret"
    file.write_bytes(SECRET + b"\n")
    return str(file)


@pytest.fixture(scope="module")
def tokens(secret_file: str) -> Tokens:
    """A realm's verifier that knows SECRET."""
    return Tokens(TokenRules(secret_file=secret_file, publish=True))


def by_public_key(tmp_path: Path, key: Any) -> Tokens:
    file = tmp_path / "public.pem"
    file.write_bytes(public_pem(key))
    return Tokens(TokenRules(public_key_file=str(file)))


def refused(tokens: Tokens, token: str, now: float = NOW) -> str:
    """What is said of a token that must not be good."""
    with pytest.raises(Unauthorized) as caught:
        tokens.verify(token, now)
    assert caught.value.status == 401
    return caught.value.detail


def good(tokens: Tokens, token: str, now: float = NOW) -> bool:
    """True, or the error."""
    return tokens.verify(token, now).expires > now


# Good tokens


def test_a_good_token(tokens: Tokens) -> None:
    """Whose it is, until when, and what it allows."""
    rights = {"subscribe": ["news", "user.42.*", 17], "publish": ["chat.*"]}
    claims = tokens.verify(make_token({"exp": NOW + 60, "sub": "42", "pushup": rights}, hs256()), NOW)
    assert (claims.subject, claims.expires) == ("42", NOW + 60)
    channels = ("news", "user.42.a", "17", "chat.1", "user.4", "1")
    assert [name for name in channels if claims.subscribe.covers(name)] == ["news", "user.42.a", "17"]
    assert [name for name in channels if claims.publish.covers(name)] == ["chat.1"]


def test_a_token_that_allows_nothing(tokens: Tokens) -> None:
    """Without the claim its holder is known, and may nothing."""
    claims = tokens.verify(make_token({"exp": NOW + 60}, hs256()), NOW)
    assert not claims.subscribe.covers("news")
    assert not claims.publish.covers("news")
    assert claims.subject is None


@pytest.mark.parametrize(
    ("key", "algorithm", "sign"),
    [
        (rsa_key, "RS256", rs256),
        (ec_key, "ES256", es256),
        (ed_key, "EdDSA", eddsa),
    ],
)
def test_a_token_by_a_public_key(
    key: Callable[..., Any], algorithm: str, sign: Callable[..., Signer], tmp_path: Path
) -> None:
    """The algorithm follows from the key; another key of the same kind does not do."""
    tokens = by_public_key(tmp_path, key())
    claims = tokens.verify(make_token(PAYLOAD, sign(key()), algorithm), NOW)
    assert claims.subscribe.covers("news")
    assert refused(tokens, make_token(PAYLOAD, sign(key("b")), algorithm)) == NOT_GOOD


def test_a_realm_that_lets_no_token_publish(secret_file: str) -> None:
    """Whatever the token says."""
    tokens = Tokens(TokenRules(secret_file=secret_file))
    claims = tokens.verify(make_token({"exp": NOW + 1, "pushup": {"publish": ["*"]}}, hs256()), NOW)
    assert not claims.publish.covers("a")


# Times


@pytest.mark.parametrize(
    ("leeway", "claims", "result"),
    [
        (0, {"exp": NOW + 1}, NOW + 1),
        (0, {"exp": NOW + 1e-3}, NOW + 1e-3),
        (0, {"exp": NOW}, TokenExpired),
        (0, {"exp": NOW - 1}, TokenExpired),
        (0, {"exp": int(NOW) + 1}, NOW + 1),
        (5, {"exp": NOW - 4.5}, NOW + 0.5),
        (5, {"exp": NOW - 5}, TokenExpired),
        (0, {"exp": NOW + 9, "nbf": NOW}, NOW + 9),
        (0, {"exp": NOW + 9, "nbf": NOW + 0.5}, Unauthorized),
        (5, {"exp": NOW + 9, "nbf": NOW + 5}, NOW + 14),
        (5, {"exp": NOW + 9, "nbf": NOW + 5.5}, Unauthorized),
        (0, {"exp": NOW + 9, "iat": NOW + 1000}, NOW + 9),
        (0, {"exp": NOW + 9, "iat": "yesterday"}, NOW + 9),
        (0, {"exp": 2**70}, float(2**70)),
        (0, {"exp": 0}, TokenExpired),
        (0, {"exp": -1}, TokenExpired),
        (300, {"exp": -(2**70)}, TokenExpired),
    ],
)
def test_times(leeway: float, claims: Any, result: Any, secret_file: str) -> None:
    """A token is good from nbf inclusive to exp exclusive; leeway widens both ends."""
    tokens = Tokens(TokenRules(secret_file=secret_file, leeway=leeway))
    token = make_token(claims, hs256())
    if isinstance(result, float):
        assert tokens.verify(token, NOW).expires == result
    else:
        with pytest.raises(Unauthorized) as caught:
            tokens.verify(token, NOW)
        assert type(caught.value) is result


@pytest.mark.parametrize("name", ["exp", "nbf"])
@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1e400",
        "1" + "0" * 400,
        "9" * 5000,
        "true",
        "false",
        '"1900000000"',
        "[]",
        "{}",
        "[1900000000]",
        '"soon"',
    ],
)
def test_a_time_that_is_none(name: str, value: str, tokens: Tokens) -> None:
    """Nothing but a finite number is a time, whoever signed it."""
    times = {"exp": "1900000000", name: value}
    payload = "{" + ",".join(f'"{each}":{time}' for each, time in times.items()) + "}"
    assert refused(tokens, make_token(payload.encode(), hs256())) in (
        f"the token's {name} is not a time in seconds",
        NOT_GOOD,
    )


@pytest.mark.parametrize("payload", [{}, {"exp": None}, {"Exp": NOW + 9}, {"nbf": 0, "pushup": {"subscribe": ["*"]}}])
def test_a_token_without_an_end(payload: Any, tokens: Tokens) -> None:
    """A token that is lost must not be good for ever."""
    assert refused(tokens, make_token(payload, hs256())) == "the token has no exp"


def test_nbf_null_is_no_time(tokens: Tokens) -> None:
    """A member that is there is read."""
    assert (
        refused(tokens, make_token({"exp": NOW + 9, "nbf": None}, hs256()))
        == "the token's nbf is not a time in seconds"
    )


# Who it is by, for, and whose


@pytest.mark.parametrize(
    ("claims", "good"),
    [
        ({"iss": "us", "aud": "push"}, True),
        ({"iss": "us", "aud": ["other", "push"]}, True),
        ({"iss": "us", "aud": ["push"]}, True),
        ({"iss": "us", "aud": "other"}, False),
        ({"iss": "us", "aud": "pushx"}, False),
        ({"iss": "us", "aud": "PUSH"}, False),
        ({"iss": "us", "aud": []}, False),
        ({"iss": "us", "aud": ["other"]}, False),
        ({"iss": "us", "aud": ["push", 1]}, False),
        ({"iss": "us", "aud": [["push"]]}, False),
        ({"iss": "us", "aud": {"push": True}}, False),
        ({"iss": "us", "aud": None}, False),
        ({"iss": "us"}, False),
        ({"iss": "them", "aud": "push"}, False),
        ({"iss": ["us"], "aud": "push"}, False),
        ({"iss": {"us": 1}, "aud": "push"}, False),
        ({"iss": "u", "aud": "push"}, False),
        ({"iss": "us/", "aud": "push"}, False),
        ({"iss": None, "aud": "push"}, False),
        ({"aud": "push"}, False),
        ({}, False),
    ],
)
def test_issuer_and_audience(claims: Any, good: bool, secret_file: str) -> None:
    """Both have to be those of the rules, exactly; of several audiences one has to be ours."""
    tokens = Tokens(TokenRules(secret_file=secret_file, issuer="us", audience="push"))
    token = make_token({"exp": NOW + 9, **claims}, hs256())
    if good:
        assert tokens.verify(token, NOW).expires == NOW + 9
    else:
        assert refused(tokens, token).startswith("the token ")


def test_a_token_for_an_audience_where_none_is_named(tokens: Tokens) -> None:
    """It is for somebody else (RFC 7519, 4.1.3)."""
    assert refused(tokens, make_token({"exp": NOW + 9, "aud": "other"}, hs256())).endswith("for somebody else")


@pytest.mark.parametrize(("sub", "subject"), [("42", "42"), ("", ""), ("\u2603", "\u2603"), (None, None)])
def test_a_subject(sub: str | None, subject: str | None, tokens: Tokens) -> None:
    """Any string; null is none."""
    assert tokens.verify(make_token({"exp": NOW + 9, "sub": sub}, hs256()), NOW).subject == subject


@pytest.mark.parametrize("sub", [42, 1.5, True, [], ["42"], {"id": 42}])
def test_a_subject_of_another_kind(sub: Any, tokens: Tokens) -> None:
    """What would be counted as whose is a string."""
    assert refused(tokens, make_token({"exp": NOW + 9, "sub": sub}, hs256())) == "the token's sub is not a string"


# What it allows


@pytest.mark.parametrize(
    "rights",
    [
        None,
        "*",
        [],
        ["news"],
        1,
        True,
        {"subscribe": "*"},
        {"subscribe": None},
        {"subscribe": {"news": True}},
        {"subscribe": [None]},
        {"subscribe": [1.5]},
        {"subscribe": [True]},
        {"subscribe": [["news"]]},
        {"subscribe": [{}]},
        {"subscribe": [0]},
        {"subscribe": [-1]},
        {"subscribe": [2**70]},
        {"subscribe": ["01"]},
        {"subscribe": [""]},
        {"subscribe": ["a*b"]},
        {"subscribe": ["**"]},
        {"subscribe": ["*", "user.*.inbox"]},
        {"subscribe": ["\ud800"]},
        {"subscribe": ["a\u0000"]},
        {"publish": ["a*b"]},
        {"publish": "chat"},
        {"subscribe": ["news"], "manage": ["*"]},
        {"Subscribe": ["news"]},
        {"": []},
    ],
)
def test_rights_of_another_form(rights: Any, tokens: Tokens) -> None:
    """What nobody can be sure of is refused as a whole, rather than read as less or as more."""
    detail = refused(tokens, make_token({"exp": NOW + 9, "pushup": rights}, hs256()))
    assert detail.startswith("the token")
    detail.encode()


def test_of_a_claim_that_is_there_twice_the_last_counts(tokens: Tokens) -> None:
    """As everywhere in JSON; what counts is what was signed."""
    payload = b'{"exp":1,"exp":1900000000,"pushup":{"subscribe":["*"]},"pushup":{"subscribe":["a"]}}'
    claims = tokens.verify(make_token(payload, hs256()), NOW)
    assert claims.subscribe.covers("a")
    assert not claims.subscribe.covers("b")
    assert claims.expires == 1_900_000_000


# Confusion of algorithms


@pytest.mark.parametrize(
    "algorithm",
    ["none", "None", "NONE", "nOnE", " none", "none ", "", None, "null", 0, [], ["HS256"], {}, True, "HS256 "],
)
@pytest.mark.parametrize("signature", [b"", b"x", "right"])
def test_a_token_that_wants_no_signature(algorithm: Any, signature: bytes | str, tokens: Tokens) -> None:
    """alg none in every spelling, with the signature left out, made up or even right."""

    def sign(data: bytes) -> bytes:
        return signature if isinstance(signature, bytes) else hs256()(data)

    assert refused(tokens, make_token(PAYLOAD, sign, algorithm)) == NOT_GOOD


def test_no_algorithm_at_all(tokens: Tokens) -> None:
    """A header has to say it."""
    signed = f"{encode({'typ': 'JWT'})}.{encode(PAYLOAD)}"
    assert refused(tokens, f"{signed}.{encode(hs256()(signed.encode()))}") == NOT_GOOD


@pytest.mark.parametrize("algorithm", ["hs256", "HS384", "HS512", "RS256", "ES256", "EdDSA", "PS256", "HS1", "HS256\0"])
def test_a_secret_is_used_with_one_algorithm(algorithm: str, tokens: Tokens) -> None:
    """Whatever the token says, and though the signature would be right."""
    assert refused(tokens, make_token(PAYLOAD, hs256(), algorithm)) == NOT_GOOD
    assert refused(tokens, make_token(PAYLOAD, hs512(), algorithm)) == NOT_GOOD


@pytest.mark.parametrize("key", [rsa_key, ec_key, ed_key])
@pytest.mark.parametrize("form", ["PEM", "PEM stripped", "DER", "PKCS1", "raw", "empty"])
@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256", "EdDSA"])
def test_the_public_key_as_a_secret(key: Callable[[], Any], form: str, algorithm: str, tmp_path: Path) -> None:
    """Everybody knows the public key, in all its forms, so it must not do as the secret of HS256."""
    public = key().public_key()
    pem = public_pem(key())
    secret = {
        "PEM": pem,
        "PEM stripped": pem.strip(),
        "DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "PKCS1": public.public_bytes(Encoding.PEM, PublicFormat.PKCS1) if key is rsa_key else pem,
        "raw": public.public_bytes(Encoding.Raw, PublicFormat.Raw) if key is ed_key else pem,
        "empty": b"",
    }[form]
    assert refused(by_public_key(tmp_path, key()), make_token(PAYLOAD, hs256(secret), algorithm)) == NOT_GOOD


@pytest.mark.parametrize(
    ("algorithm", "sign"), [("PS256", ps256), ("RS512", rs512), ("RS384", rs256), ("PS256", rs256)]
)
def test_an_rsa_key_is_used_with_one_algorithm(algorithm: str, sign: Callable[..., Signer], tmp_path: Path) -> None:
    """The same key may sign in other ways; only one is asked for."""
    tokens = by_public_key(tmp_path, rsa_key())
    assert refused(tokens, make_token(PAYLOAD, sign(rsa_key()), algorithm)) == NOT_GOOD
    if sign is not rs256:
        assert refused(tokens, make_token(PAYLOAD, sign(rsa_key()), "RS256")) == NOT_GOOD


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1, ec.SECP256K1])
@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512", "ES256K"])
def test_a_signature_of_another_curve(curve: type[ec.EllipticCurve], algorithm: str, tmp_path: Path) -> None:
    """ES256 is P-256."""
    tokens = by_public_key(tmp_path, ec_key())
    assert refused(tokens, make_token(PAYLOAD, es256(ec_key("a", curve)), algorithm)) == NOT_GOOD


@pytest.mark.parametrize("signature", [bytes(64), bytes(31) + b"\1" + bytes(31) + b"\1", b"\xff" * 64, bytes(63), b""])
def test_psychic_signatures(signature: bytes, tmp_path: Path) -> None:
    """r = s = 0, which some verifiers took for good, and what else is no signature."""
    tokens = by_public_key(tmp_path, ec_key())
    assert refused(tokens, make_token(PAYLOAD, lambda data: signature, "ES256")) == NOT_GOOD


def test_a_signature_in_asn1(tmp_path: Path) -> None:
    """A signature has one form."""
    tokens = by_public_key(tmp_path, ec_key())
    token = make_token(PAYLOAD, lambda data: ec_key().sign(data, ec.ECDSA(hashes.SHA256())), "ES256")
    assert refused(tokens, token) == NOT_GOOD


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c", "x5t", "kid"])
def test_a_token_that_brings_its_key(name: str, tmp_path: Path) -> None:
    """Nothing in a token says by which key it is verified."""
    attacker = rsa_key("attacker")
    header = {
        "jwk": rsa_jwk(attacker),
        "jku": "http://127.0.0.1:1/jwks",
        "x5u": "http://127.0.0.1:1/cert",
        "x5c": [base64.b64encode(attacker.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)).decode()],
        "x5t": "abc",
        "kid": "attacker",
    }
    token = make_token(PAYLOAD, rs256(attacker), "RS256", **{name: header[name]})
    assert refused(by_public_key(tmp_path, rsa_key()), token) == NOT_GOOD


@pytest.mark.parametrize(
    "kid", ["../../../../dev/null", "/dev/null", "' OR 1=1", "x" * 10_000, "", "a\0b", "\u2603", "http://127.0.0.1:1/"]
)
def test_a_kid_opens_no_file(kid: str, tokens: Tokens) -> None:
    """It is a name among the keys of a set; where there is one key it means nothing."""
    assert good(tokens, make_token(PAYLOAD, hs256(), kid=kid), NOW)
    assert refused(tokens, make_token(PAYLOAD, hs256(b""), kid=kid)) == NOT_GOOD


@pytest.mark.parametrize("kid", [1, 1.5, [], ["a"], {}, True, None])
def test_a_kid_of_another_kind(kid: Any, tokens: Tokens) -> None:
    """It is a string (RFC 7515, 4.1.4)."""
    assert refused(tokens, make_token(PAYLOAD, hs256(), kid=kid)) == NOT_GOOD


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["exp"], "exp": 1},
        {"crit": []},
        {"crit": None},
        {"crit": ["b64"], "b64": False},
        {"crit": ["b64"], "b64": True},
        {"b64": False},
    ],
)
def test_critical_extensions(header: dict[str, Any], tokens: Tokens) -> None:
    """None is known here, so a token that insists on one is refused; and a payload is always encoded."""
    assert refused(tokens, make_token(PAYLOAD, hs256(), **header)) == NOT_GOOD
    signed = f"{encode({'alg': 'HS256', **header})}.".encode() + json.dumps(PAYLOAD).encode()
    assert refused(tokens, f"{signed.decode()}.{encode(hs256()(signed))}") == NOT_GOOD
    detached = f"{encode({'alg': 'HS256', **header})}."
    assert refused(tokens, f"{detached}.{encode(hs256()(signed))}") == NOT_GOOD


# What is not a token, or was one


def test_a_signature_that_is_another_ones(tokens: Tokens) -> None:
    """Parts of two good tokens make no third."""
    one = make_token({"exp": NOW + 9, "pushup": {"subscribe": ["a"]}}, hs256()).split(".")
    two = make_token({"exp": NOW + 9, "pushup": {"subscribe": ["*"]}}, hs256()).split(".")
    assert refused(tokens, ".".join([one[0], two[1], one[2]])) == NOT_GOOD
    assert refused(tokens, ".".join([one[0], one[1], two[2]])) == NOT_GOOD


@given(data=st.data())
def test_a_token_that_was_touched(tokens: Tokens, data: st.DataObject) -> None:
    """Any other character anywhere in it, or one more, or one less, and it is good no longer."""
    token = make_token(PAYLOAD, hs256())
    place = data.draw(st.integers(0, len(token) - 1))
    new = data.draw(st.sampled_from("AZaz09-_.= \n\0\u00e9"))
    kind = data.draw(st.sampled_from(["replace", "insert", "delete", "truncate"]))
    touched = {
        "replace": token[:place] + new + token[place + 1 :],
        "insert": token[:place] + new + token[place:],
        "delete": token[:place] + token[place + 1 :],
        "truncate": token[:place],
    }[kind]
    if touched == token or touched.rstrip("=") == token:
        return  # Padding at the end changes nothing, and nobody is taken for another.
    assert refused(tokens, touched) == NOT_GOOD


GOOD = make_token(PAYLOAD, hs256())
HEADER, BODY, SIGNATURE = GOOD.split(".")
DEEP_ARRAY = b"[" * 50_000 + b"]" * 50_000
DEEP_OBJECT = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
MANY_DIGITS = b'{"alg":' + b"9" * 10_000 + b"}"

NO_TOKENS: dict[str, str] = {
    "empty": "",
    "dots": "..",
    "four dots": "....",
    "one part": HEADER,
    "two parts": f"{HEADER}.{BODY}",
    "no signature": f"{HEADER}.{BODY}.",
    "no payload": f"{HEADER}..{SIGNATURE}",
    "no header": f".{BODY}.{SIGNATURE}",
    "a part more": f"{GOOD}.{SIGNATURE}",
    "a part before": f"{HEADER}.{GOOD}",
    "twice": f"{GOOD},{GOOD}",
    "half a signature": GOOD[:-20],
    "padding within": f"{HEADER}=.{BODY}=.{SIGNATURE}=",
    "too much padding": f"{GOOD}===",
    "another alphabet": f"{HEADER}.{BODY}.{SIGNATURE[:-2]}+/",
    "a blank before": f" {GOOD}",
    "a blank after": f"{GOOD} ",
    "a line break": f"{GOOD}\n",
    "a NUL": f"{GOOD}\0",
    "Bearer twice": f"Bearer {GOOD}",
    "quotes": f'"{GOOD}"',
    "letters of other scripts": "\u2603.\u2603.\u2603",
    "bytes that are no text": "\udcff.\udcff.\udcff",
    "bytes that are no text at the end": f"{GOOD}\udcff",
    "JSON": '{"alg":"none"}',
    "JSON serialization": json.dumps({"payload": BODY, "protected": HEADER, "signature": SIGNATURE}),
    "JWE": ".".join([encode({"alg": "dir", "enc": "A256GCM"}), "", encode(bytes(12)), encode(b"x"), encode(bytes(16))]),
    "a deep header": f"{encode(DEEP_ARRAY)}.{BODY}.{SIGNATURE}",
    "a deeper header": f"{encode(DEEP_OBJECT)}.{BODY}.{SIGNATURE}",
    "a header that is a list": f"{encode(['HS256'])}.{BODY}.{SIGNATURE}",
    "a header that is no JSON": f"{encode(b'alg')}.{BODY}.{SIGNATURE}",
    "a header that is no text": f"{encode(bytes([255, 254]))}.{BODY}.{SIGNATURE}",
    "an empty header": f"{encode({})}.{BODY}.{SIGNATURE}",
    "a megabyte of dots": "." * 1_000_000,
    "a megabyte of letters": "A" * 1_000_000,
    "a megabyte of padding": f"{HEADER}.{BODY}.{'=' * 1_000_000}",
    "a header with a number of many digits": f"{encode(MANY_DIGITS)}.{BODY}.{SIGNATURE}",
}


@pytest.mark.parametrize("token", NO_TOKENS.values(), ids=NO_TOKENS)
def test_what_is_no_token(token: str, tokens: Tokens) -> None:
    """A stranger hears one sentence, whatever he sends, and the reason is nobody's but the log's."""
    assert refused(tokens, token) == NOT_GOOD


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"text"',
        b"\xff",
        b"[" * 50_000,
        b"[" * 50_000 + b"]" * 50_000,
        GOOD.encode(),
        json.dumps(GOOD).encode(),
        b'{"exp":1900000000}x',
        b'{"exp":1900000000,}',
    ],
)
def test_signed_but_no_claims(payload: bytes, tokens: Tokens) -> None:
    """A payload is a JSON object, and a token in a token is none."""
    assert refused(tokens, make_token(payload, hs256())) == NOT_GOOD
    assert refused(tokens, make_token(payload, hs256(), cty="JWT")) == NOT_GOOD


def test_a_huge_token(tokens: Tokens) -> None:
    """How long a token may be is the head's limit, not the verifier's: every right in it counts."""
    rights = {"subscribe": [f"channel.{number}" for number in range(50_000)]}
    claims = tokens.verify(make_token({"exp": NOW + 9, "pushup": rights}, hs256()), NOW)
    assert claims.subscribe.covers("channel.49999")
    assert not claims.subscribe.covers("channel.50000")


@given(
    payload=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["exp", "nbf", "sub", "pushup", "subscribe", "publish", "aud", "iss", "jti"]), inner
            )
        ),
        max_leaves=10,
    ),
    header=st.dictionaries(
        st.sampled_from(["alg", "kid", "crit", "b64", "typ", "zip", "enc"]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2),
    ),
)
def test_no_token_raises_anything_else(tokens: Tokens, payload: Any, header: dict[str, Any]) -> None:
    """Whatever somebody signed, it is claims or Unauthorized."""
    signed = f"{encode({'alg': 'HS256', **header})}.{encode(payload)}"
    token = f"{signed}.{encode(hs256()(signed.encode()))}"
    try:
        claims: Claims | None = tokens.verify(token, NOW)
    except Unauthorized:
        claims = None
    assert claims is None or claims.expires > NOW


def test_a_refusal_shows_nothing_of_the_token(tokens: Tokens, caplog: pytest.LogCaptureFixture) -> None:
    """Not in its sentence, its members or the log, at any level."""
    caplog.set_level(logging.DEBUG)
    for token in (GOOD[:-1], f"{HEADER}.{BODY}.", make_token({"exp": 1}, hs256())):
        with pytest.raises(Unauthorized) as caught:
            tokens.verify(token, NOW)
        shown = caught.value.body().decode() + caplog.text
        assert not [part for part in token.split(".") if part and part in shown]
    assert SECRET.decode() not in caplog.text


# Key files


def write(folder: Path, data: bytes) -> str:
    file = folder / "file"
    file.write_bytes(data)
    return str(file)


def private_pem(key: Any) -> bytes:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert isinstance(pem, bytes)
    return pem


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "has 0 bytes; HS256 needs 32 or more"),
        (b"x" * 31 + b"\n", "has 31 bytes; HS256 needs 32 or more"),
        (public_pem(ed_key()), "is no secret but a PEM file; a public key belongs into public_key_file"),
        (private_pem(ed_key()), "is no secret but a PEM file"),
    ],
)
def test_a_wrong_secret(data: bytes, said: str, tmp_path: Path) -> None:
    """One that could be guessed, or that everybody knows."""
    file = write(tmp_path, data)
    with pytest.raises(SettingsError) as caught:
        Tokens(TokenRules(secret_file=file))
    assert said in caught.value.detail
    assert file in caught.value.detail
    assert not data.strip() or data.strip().decode() not in caught.value.detail


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is not a public key in PEM"),
        (SECRET, "is not a public key in PEM"),
        (private_pem(ec_key()), "is not a public key in PEM"),
        (public_pem(ec_key())[:-40], "is not a public key in PEM"),
        (public_pem(rsa_key("small", 1024)), "is of no kind that is used here"),
        (public_pem(ec_key("a", ec.SECP384R1)), "is of no kind that is used here"),
        (public_pem(ec_key("a", ec.SECP256K1)), "is of no kind that is used here"),
        (public_pem(ed448.Ed448PrivateKey.generate()), "is of no kind that is used here"),
    ],
)
def test_a_wrong_public_key(data: bytes, said: str, tmp_path: Path) -> None:
    """The sentence names the file and what would do."""
    file = write(tmp_path, data)
    with pytest.raises(SettingsError) as caught:
        Tokens(TokenRules(public_key_file=file))
    assert said in caught.value.detail
    assert file in caught.value.detail


@pytest.mark.parametrize("name", ["secret_file", "public_key_file"])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    """The sentence says which setting, which file and why."""
    for file, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(SettingsError) as caught:
            Tokens(TokenRules(**{name: str(file)}))  # type: ignore[arg-type]
        assert caught.value.detail == f"cannot read the {name} {file}: {reason}"


# Key sets


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/jwks",
        "https://example.com:8443/@tenant",
        "http://127.0.0.1:1/",
        "http://localhost/jwks",
        "http://127.8.9.10/",
        "http://[::1]:80/jwks",
    ],
)
def test_urls_of_key_sets(url: str) -> None:
    """TLS, or no network in between."""
    assert Jwks(url).url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/jwks",
        "http://10.0.0.1/",
        "http://localhost.example.com/",
        "http://127.0.0.1.example.com/",
        "http://[::2]/",
        "http://0.0.0.0/",
        "ftp://localhost/",
        "file:///etc/passwd",
        "",
        "jwks",
        "https:///jwks",
        "https://",
        "http://",
        "http://[::1/",
        "//localhost/",
        "HTTP//localhost",
    ],
)
def test_urls_that_anybody_could_answer(url: str) -> None:
    """Who answers there decides whose tokens are good."""
    with pytest.raises(SettingsError) as caught:
        Jwks(url)
    assert "jwks_url" in caught.value.detail
    assert repr(url) in caught.value.detail


def test_the_keys_of_a_set() -> None:
    """RSA, P-256 and Ed25519, each with its algorithm, by their ids."""
    keys = parse_jwks(jwks(rsa_jwk(rsa_key(), "r"), ec_jwk(ec_key(), "e"), ed_jwk(ed_key(), "o"), ec_jwk(ec_key("b"))))
    assert {kid: key.algorithm for kid, key in keys.items()} == {
        "r": "RS256",
        "e": "ES256",
        "o": "EdDSA",
        None: "ES256",
    }


def jwks(*keys: Any) -> bytes:
    return json.dumps({"keys": keys}).encode()


@pytest.mark.parametrize(
    "key",
    [
        rsa_jwk(rsa_key(), "k", use="enc"),
        rsa_jwk(rsa_key(), "k", use=1),
        rsa_jwk(rsa_key(), "k", key_ops=["encrypt"]),
        rsa_jwk(rsa_key(), "k", key_ops=[]),
        rsa_jwk(rsa_key(), "k", key_ops=5),
        rsa_jwk(rsa_key(), "k", key_ops=None),
        rsa_jwk(rsa_key(), "k", key_ops="verify"),
        rsa_jwk(rsa_key(), "k", alg="PS256"),
        rsa_jwk(rsa_key(), "k", alg="RS512"),
        rsa_jwk(rsa_key(), "k", alg="HS256"),
        rsa_jwk(rsa_key(), "k", alg="none"),
        rsa_jwk(rsa_key(), "k", alg=["RS256"]),
        rsa_jwk(rsa_key(), "k", alg={}),
        rsa_jwk(rsa_key("small", 1024), "k"),
        rsa_jwk(rsa_key(), "k", d="AQAB"),
        ed_jwk(ed_key(), "k", d=encode(ed_key().private_bytes_raw())),
        {**rsa_jwk(rsa_key()), "kid": 1},
        {**rsa_jwk(rsa_key()), "kid": ["k"]},
        {**rsa_jwk(rsa_key(), "k"), "n": 1},
        {**rsa_jwk(rsa_key(), "k"), "n": ""},
        {**rsa_jwk(rsa_key(), "k"), "n": None},
        {**rsa_jwk(rsa_key(), "k"), "n": "\u2603"},
        {**rsa_jwk(rsa_key(), "k"), "e": []},
        {**rsa_jwk(rsa_key(), "k"), "e": "AA"},
        ec_jwk(ec_key("a", ec.SECP384R1), "k"),
        ec_jwk(ec_key(), "k", crv="P-384"),
        ec_jwk(ec_key(), "k", crv=1),
        ec_jwk(ec_key(), "k", x="AA"),
        ec_jwk(ec_key(), "k", y=encode(bytes(32))),
        ec_jwk(ec_key(), "k", alg="EdDSA"),
        ed_jwk(ed_key(), "k", crv="X25519"),
        ed_jwk(ed_key(), "k", crv=["Ed25519"]),
        ed_jwk(ed_key(), "k", x="AA"),
        {"kty": "oct", "kid": "k", "k": encode(SECRET)},
        {"kty": "oct", "kid": "k", "k": encode(SECRET), "alg": "HS256"},
        {"kty": ["RSA"], "kid": "k"},
        {"kty": "RSA", "kid": "k"},
        {"kid": "k"},
        {},
        [],
        "k",
        1,
        None,
    ],
)
def test_keys_that_are_left_out(key: Any) -> None:
    """For another use, too weak, private, symmetric, broken: such a key is none, and spoils no other."""
    assert list(parse_jwks(jwks(key, ed_jwk(ed_key(), "good")))) == ["good"]


@pytest.mark.parametrize(
    "text", [b"", b"<html>", b"[]", b"{}", b'{"keys":{}}', b'{"keys":null}', b"\xff", b"null", b"1"]
)
def test_what_is_no_key_set(text: bytes) -> None:
    """It is said, so that the keys that are there stay."""
    with pytest.raises(ValueError, match=r"."):
        parse_jwks(text)


@given(
    st.dictionaries(
        st.sampled_from(["kty", "kid", "use", "alg", "crv", "x", "y", "n", "e", "key_ops", "x5c"]),
        st.none()
        | st.integers()
        | st.sampled_from(["RSA", "EC", "OKP", "P-256", "Ed25519", "AQAB", "sig", encode(bytes(32)), "ES256", "="])
        | st.lists(st.text(max_size=3), max_size=2)
        | st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    )
)
def test_no_key_spoils_a_set(key: dict[str, Any]) -> None:
    """Whatever a key looks like, the others are there."""
    assert "good" in parse_jwks(jwks(key, ed_jwk(ed_key(), "good")))


class KeyServer:
    """Answers for a key set, as told."""

    def __init__(self) -> None:
        self.url = ""
        self.requests = 0
        self.path = ""
        """Of the last request."""
        self.released = asyncio.Event()
        self._last = b""
        self.answer: Callable[[], Awaitable[web.StreamResponse]]
        self.serve(b"")

    def serve(self, body: bytes, **more: Any) -> None:
        """Have that body from now on, with what else a response is made of."""

        async def answer() -> web.StreamResponse:
            return web.Response(body=body, **more)

        self.answer = answer

    def publish(self, *keys: Any) -> None:
        """Have these keys."""
        self.serve(jwks(*keys), content_type="application/json")

    def redirect(self, body: bytes) -> None:
        """Have that body at another path, and say so at ours."""

        async def answer() -> web.StreamResponse:
            if self.path == "/other":
                return web.Response(body=body)
            return web.Response(status=302, headers={"Location": "/other"})

        self.answer = answer

    def stall(self) -> None:
        """Do not answer any more."""

        async def answer() -> web.StreamResponse:
            await self.released.wait()
            return web.Response(body=self._last)

        self.answer = answer

    def release(self, body: bytes) -> None:
        """Answer at last, to those who wait."""
        self._last = body
        self.released.set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests += 1
        self.path = request.path
        return await self.answer()


@asynccontextmanager
async def key_server() -> AsyncIterator[KeyServer]:
    """A server on this machine that knows a key set."""
    server = KeyServer()
    runner = web.ServerRunner(web.Server(server.handle), shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}/jwks"
    try:
        yield server
    finally:
        server.released.set()
        await runner.cleanup()


def by_url(server: KeyServer) -> tuple[Tokens, Jwks]:
    tokens = Tokens(TokenRules(jwks_url=server.url, audience="push"))
    assert tokens.jwks is not None
    return tokens, tokens.jwks


def token_by(key: ed25519.Ed25519PrivateKey, kid: str | None, **claims: Any) -> str:
    header = {} if kid is None else {"kid": kid}
    return make_token(
        {"exp": NOW + 10 * JWKS_KEPT_S, "aud": "push", **PAYLOAD_RIGHTS, **claims}, eddsa(key), "EdDSA", **header
    )


PAYLOAD_RIGHTS: Mapping[str, Any] = {"pushup": {"subscribe": ["news"]}}


def needs_keys(tokens: Tokens, token: str, now: float) -> bool:
    """Whether the token can only be judged after another fetch."""
    try:
        tokens.verify(token, now)
    except KeysNeeded:
        return True
    except PushUpError:
        pass
    return False


async def test_a_key_set_is_fetched_once() -> None:
    """Whoever wants it while it is being fetched waits for the same answer; then it is there."""
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"))
        tokens, keys = by_url(server)
        token = token_by(ed_key(), "a")
        assert needs_keys(tokens, token, NOW)
        first = asyncio.create_task(keys.fetch(NOW))
        await asyncio.sleep(0)
        assert needs_keys(tokens, token, NOW)
        await asyncio.gather(first, *(keys.fetch(NOW + number) for number in range(50)))
        assert server.requests == 1
        assert good(tokens, token, NOW)
        await keys.fetch(NOW + JWKS_PAUSE_S - 0.1)
        assert server.requests == 1


async def test_who_gives_up_waiting_takes_nobody_along() -> None:
    """A client that goes away does not stop the fetch that others wait for."""
    async with key_server() as server:
        server.stall()
        tokens, keys = by_url(server)
        gone, waiting = asyncio.create_task(keys.fetch(NOW)), asyncio.create_task(keys.fetch(NOW))
        await eventually(lambda: server.requests == 1, "the key set is asked for")
        gone.cancel()
        await asyncio.wait([gone])
        server.release(jwks(ed_jwk(ed_key(), "a")))
        await asyncio.wait([waiting])
        assert gone.cancelled()
        assert not waiting.cancelled()
        assert good(tokens, token_by(ed_key(), "a"), NOW)


async def test_when_a_key_set_is_stale() -> None:
    """Five minutes after it was fetched, and not again while that was just tried."""
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"))
        _, keys = by_url(server)
        assert keys.is_stale(NOW)
        await keys.fetch(NOW)
        assert not keys.is_stale(NOW + JWKS_FRESH_S)
        assert keys.is_stale(NOW + JWKS_FRESH_S + 1)
        server.serve(b"", status=500)
        await keys.fetch(NOW + JWKS_FRESH_S + 1)
        assert not keys.is_stale(NOW + JWKS_FRESH_S + JWKS_PAUSE_S)
        assert keys.is_stale(NOW + JWKS_FRESH_S + 1 + JWKS_PAUSE_S)


async def test_unknown_keys_fetch_seldom() -> None:
    """However many tokens name keys that are not there, the server is asked once in ten seconds."""
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"), ed_jwk(ed_key("b"), "b"))
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        for second in range(40):
            for kid in ("x", "y", "", None, "a" * 1000):
                token = token_by(ed_key(), kid)
                if needs_keys(tokens, token, NOW + second):
                    await keys.fetch(NOW + second)
                    assert refused(tokens, token, NOW + second) == NOT_GOOD
        assert server.requests == 4


async def test_a_new_key_is_known_with_its_first_token() -> None:
    """Nobody waits for the set to become stale."""
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"))
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        server.publish(ed_jwk(ed_key(), "a"), ed_jwk(ed_key("b"), "b"))
        new = token_by(ed_key("b"), "b")
        assert refused(tokens, new, NOW + 1) == NOT_GOOD
        assert needs_keys(tokens, new, NOW + JWKS_PAUSE_S)
        await keys.fetch(NOW + JWKS_PAUSE_S)
        assert good(tokens, new, NOW + JWKS_PAUSE_S)
        assert good(tokens, token_by(ed_key(), "a"), NOW + JWKS_PAUSE_S)


@pytest.mark.parametrize(
    ("after", "changed"),
    [
        ([ed_jwk(ed_key("b"), "b")], True),
        ([ed_jwk(ed_key("b"), "a")], True),
        ([ed_jwk(ed_key(), "renamed")], True),
        ([ed_jwk(ed_key(), "a")], False),
        ([ed_jwk(ed_key(), "a", use="sig")], False),
        ([ed_jwk(ed_key("b"), "b"), ed_jwk(ed_key(), "a")], False),
    ],
)
async def test_a_key_that_is_taken_out(after: list[Any], changed: bool) -> None:
    """Its tokens are refused after the next fetch, and whoever remembers some is told to forget."""
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"))
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        told = []
        keys.on_change = lambda: told.append(True)
        server.publish(*after)
        await keys.fetch(NOW + 400)
        assert bool(told) is changed
        token = token_by(ed_key(), "a")
        if changed:
            assert refused(tokens, token, NOW + 401) == NOT_GOOD
        else:
            assert good(tokens, token, NOW + 401)


async def test_a_token_without_kid() -> None:
    """It is by the only key there is; where there are two it has to say by which."""
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"))
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        assert good(tokens, token_by(ed_key(), None), NOW)
        server.publish(ed_jwk(ed_key(), "a"), ed_jwk(ed_key("b"), "b"))
        await keys.fetch(NOW + JWKS_PAUSE_S)
        assert refused(tokens, token_by(ed_key(), None), NOW + JWKS_PAUSE_S) == NOT_GOOD


async def test_a_key_of_a_set_is_used_with_its_own_algorithm() -> None:
    """Neither the public key as a secret, nor another key's algorithm, nor a key that the token brings."""
    async with key_server() as server:
        server.publish(rsa_jwk(rsa_key(), "r"), ed_jwk(ed_key(), "o"), {"kty": "oct", "kid": "s", "k": encode(SECRET)})
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        claims = {"exp": NOW + 9, "aud": "push"}
        assert good(tokens, make_token(claims, rs256(rsa_key()), "RS256", kid="r"), NOW)
        for token in (
            make_token(claims, hs256(public_pem(rsa_key())), "HS256", kid="r"),
            make_token(claims, hs256(), "HS256", kid="s"),
            make_token(claims, ps256(rsa_key()), "PS256", kid="r"),
            make_token(claims, eddsa(ed_key()), "EdDSA", kid="r"),
            make_token(claims, rs256(rsa_key()), "RS256", kid="o"),
            make_token(claims, eddsa(ed_key("b")), "EdDSA", kid="o", jwk=ed_jwk(ed_key("b"))),
            make_token(claims, eddsa(ed_key("b")), "EdDSA", kid="new", jku=server.url),
            make_token(claims, lambda data: b"", "none", kid="o"),
        ):
            assert refused(tokens, token) == NOT_GOOD
        assert server.requests == 1


def server_answers(server: KeyServer, trouble: str) -> None:
    document = jwks(ed_jwk(ed_key("b"), "b"))
    match trouble:
        case "500":
            server.serve(document, status=500)
        case "204":
            server.serve(b"", status=204)
        case "redirect":
            server.redirect(document)
        case "2 MB":
            server.serve(document + b" " * 2 * JWKS_BYTES_MAX)
        case "2 MB compressed":
            server.serve(gzip.compress(document + b" " * 2 * JWKS_BYTES_MAX), headers={"Content-Encoding": "gzip"})
        case "no gzip":
            server.serve(document, headers={"Content-Encoding": "gzip"})
        case "HTML":
            server.serve(b"<!doctype html>", content_type="text/html")
        case "a deep document":
            server.serve(b"[" * 100_000)
        case "no keys":
            server.serve(jwks())
        case "no key of use":
            server.serve(jwks({"kty": "oct", "kid": "a", "k": encode(SECRET)}))
        case "slow":
            server.stall()


TROUBLES = ["500", "204", "redirect", "2 MB", "2 MB compressed", "no gzip", "HTML", "a deep document", "no keys"]
TROUBLES += ["no key of use", "slow", "down"]


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_key_set_that_cannot_be_had(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The old keys stay for a day, and then nobody can be judged; it is logged, and mends itself."""
    monkeypatch.setattr("pushup.tokens.JWKS_TIMEOUT_S", 0.1)
    token = token_by(ed_key(), "a")
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"))
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        told = []
        keys.on_change = lambda: told.append(True)
        if trouble == "down":
            keys.url = "http://127.0.0.1:1/"
        else:
            server_answers(server, trouble)
        later = NOW + JWKS_KEPT_S
        await keys.fetch(later)
        assert [record.getMessage() for record in caplog.records] == ["cannot get the key set"]
        assert good(tokens, token, later)
        assert refused(tokens, token_by(ed_key("b"), "b"), later) == NOT_GOOD
        assert not told

        later += JWKS_PAUSE_S
        assert needs_keys(tokens, token, later)
        await keys.fetch(later)
        assert told, "remembered tokens are judged again"
        with pytest.raises(Unavailable) as caught:
            tokens.verify(token, later)
        assert caught.value.members["retry_after"] == JWKS_PAUSE_S

        keys.url = server.url
        server.publish(ed_jwk(ed_key(), "a"))
        later += JWKS_PAUSE_S
        assert needs_keys(tokens, token, later)
        await keys.fetch(later)
        assert good(tokens, token, later)


async def test_a_key_set_that_was_never_had() -> None:
    """Nobody is let in, and nobody is told that his token is wrong."""
    async with key_server() as server:
        server.serve(b"", status=503)
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        with pytest.raises(Unavailable):
            tokens.verify(token_by(ed_key(), "a"), NOW)
        for token in ("", "pushup_key", "a.b.c"):
            assert refused(tokens, token) == NOT_GOOD


async def test_to_stop_ends_a_fetch() -> None:
    """Nothing is left behind of one that is under way."""
    async with key_server() as server:
        server.stall()
        _, keys = by_url(server)
        waiting = asyncio.create_task(keys.fetch(NOW))
        await eventually(lambda: server.requests == 1, "the key set is asked for")
        await keys.stop()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_two_keys_of_one_name() -> None:
    """One of them is taken; a token by either is good or refused, and nothing breaks."""
    async with key_server() as server:
        server.publish(ed_jwk(ed_key(), "a"), ed_jwk(ed_key("b"), "a"))
        tokens, keys = by_url(server)
        await keys.fetch(NOW)
        assert refused(tokens, token_by(ed_key(), "a")) == NOT_GOOD
        assert good(tokens, token_by(ed_key("b"), "a"), NOW)


def test_a_signature_can_be_written_in_two_ways(tmp_path: Path) -> None:
    """ECDSA allows it: both are good, and say the same. Who counts tokens must not count signatures."""
    tokens = by_public_key(tmp_path, ec_key())
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    token = make_token(PAYLOAD, es256(ec_key()), "ES256")
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    other = f"{signed}.{encode(raw[:32] + (order - int.from_bytes(raw[32:])).to_bytes(32))}"
    assert other != token
    assert tokens.verify(other, NOW).expires == tokens.verify(token, NOW).expires


@pytest.mark.parametrize("url", ["https://user:secret@example.com/jwks", "http://127.0.0.1@example.com/"])
def test_a_url_with_a_user_in_it(url: str) -> None:
    """It would be logged, or mistaken for another host."""
    with pytest.raises(SettingsError, match="a user or a password") as caught:
        Jwks(url)
    assert "secret" not in caught.value.detail


def test_a_clock_that_was_set_back() -> None:
    """It does not keep a key set from being fetched."""
    jwks = Jwks("https://example.com/jwks")
    jwks._tried = 1_000_000.0

    assert jwks.is_stale(900_000.0)
    assert not jwks.is_stale(1_000_001.0)
