"""JSON Web Tokens: whose they are, what they allow and whether they may be believed.

Each key has exactly one algorithm, which follows from the key and never from the token, so a token cannot choose how it
is verified. Signatures are PyJWT's; times are checked here, because the moment is an argument.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from math import isfinite
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pushup.access import NOT_GOOD, Patterns, TokenRules
from pushup.errors import SettingsError, TokenExpired, Unauthorized, Unavailable

log = logging.getLogger("pushup.tokens")

SECRET_BYTES_MIN: Final = 32
RSA_BITS_MIN: Final = 2048
JWKS_BYTES_MAX: Final = 1024 * 1024
JWKS_TIMEOUT_S: Final = 5.0
JWKS_FRESH_S: Final = 300.0
"""After this the key set is fetched again, in the background."""
JWKS_PAUSE_S: Final = 10.0
"""At least this lies between two fetches, however many tokens name a key that is not known."""
JWKS_KEPT_S: Final = 86_400.0
"""How long the last key set is believed while no new one can be had."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good token says. `subject` is None if it does not say whose it is; `expires` in Unix seconds."""

    subject: str | None
    expires: float
    subscribe: Patterns
    publish: Patterns


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that verifies, and the only algorithm it is used with."""

    algorithm: str
    material: Any


class KeysNeeded(Exception):
    """The token names a key that may be in a newer key set: fetch it, and try again."""


class Tokens:
    """Verifies the tokens of one realm."""

    def __init__(self, rules: TokenRules) -> None:
        """Reads the key files. Raises SettingsError."""
        self._rules = rules
        self.jwks: Jwks | None = None
        self._key: SigningKey | None = None
        if rules.jwks_url is not None:
            self.jwks = Jwks(rules.jwks_url)
        elif rules.secret_file is not None:
            self._key = _secret(rules.secret_file)
        elif rules.public_key_file is not None:
            self._key = _public_key(rules.public_key_file)

    def verify(self, token: str, now: float) -> Claims:
        """What the token says. `now` in Unix seconds.

        Raises Unauthorized, TokenExpired; KeysNeeded if the key set has to be fetched first, Unavailable if that has
        been tried in vain.
        """
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError):
            raise _refuse("it is neither a key nor a token") from None
        if "crit" in header:
            raise _refuse("it has critical extensions")
        key = self._key
        if key is None:
            assert self.jwks is not None
            key = self.jwks.find(header.get("kid"), now)
        if header.get("alg") != key.algorithm:
            raise _refuse("its algorithm is not that of the key")
        required = ["exp", *(["iss"] if self._rules.issuer else []), *(["aud"] if self._rules.audience else [])]
        try:
            claims = jwt.decode(
                token,
                key.material,
                algorithms=[key.algorithm],
                audience=self._rules.audience,
                issuer=self._rules.issuer,
                options={
                    "require": required,
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_sub": False,
                },
            )
        except jwt.MissingRequiredClaimError as error:
            raise Unauthorized(f"the token has no {error.claim}") from None
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
            raise Unauthorized("the token is by somebody else or for somebody else") from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise _refuse("its signature or form is wrong") from None
        return self._read(claims, now)

    def _read(self, claims: Mapping[str, Any], now: float) -> Claims:
        leeway = self._rules.leeway
        expires = _time(claims, "exp") + leeway
        if expires <= now:
            raise TokenExpired("the token has expired")
        if "nbf" in claims and _time(claims, "nbf") - leeway > now:
            raise Unauthorized("the token is not valid yet")
        subject = claims.get("sub")
        if subject is not None and not isinstance(subject, str):
            raise Unauthorized("the token's sub is not a string")
        rights = claims.get("pushup", {})
        if not isinstance(rights, dict) or not rights.keys() <= {"subscribe", "publish"}:
            raise Unauthorized("the token's pushup claim is an object with the members subscribe and publish")
        publish = _patterns(rights, "publish") if self._rules.publish else Patterns([])
        return Claims(subject, expires, _patterns(rights, "subscribe"), publish)


def _refuse(reason: str) -> Unauthorized:
    # Who may not come in does not hear why: a stranger would learn which realms there are.
    log.debug("credentials are refused", extra={"reason": reason})
    return Unauthorized(NOT_GOOD)


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims[name]
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return float(value)
    except OverflowError:
        pass  # An integer beyond all floats.
    raise Unauthorized(f"the token's {name} is not a time in seconds")


def _patterns(rights: Mapping[str, Any], name: str) -> Patterns:
    value = rights.get(name, [])
    if not isinstance(value, list) or not all(isinstance(each, str | int) for each in value):
        raise Unauthorized(f"the token's {name} is not an array of channels")
    try:
        return Patterns(value)
    except ValueError as error:
        raise Unauthorized(f"the token is wrong: {error}") from None


def _read_file(name: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read the {name} {file}: {error.strerror}") from None


def _secret(file: str) -> SigningKey:
    # An editor's line break is not the secret's; anything else is, as a secret may be any bytes.
    secret = _read_file("secret_file", file).removesuffix(b"\n").removesuffix(b"\r")
    if len(secret) < SECRET_BYTES_MIN:
        raise SettingsError(f"the secret in {file} has {len(secret)} bytes; HS256 needs {SECRET_BYTES_MIN} or more")
    if secret.startswith(b"-----BEGIN"):
        raise SettingsError(f"{file} is no secret but a PEM file; a public key belongs into public_key_file")
    return SigningKey("HS256", secret)


def _public_key(file: str) -> SigningKey:
    try:
        material = load_pem_public_key(_read_file("public_key_file", file))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SettingsError(f"{file} is not a public key in PEM") from None
    algorithm = _algorithm(material)
    if algorithm is None:
        raise SettingsError(
            f"the key in {file} is of no kind that is used here: RSA of {RSA_BITS_MIN} bits or more, EC P-256, Ed25519"
        )
    return SigningKey(algorithm, material)


def _algorithm(material: Any) -> str | None:
    if isinstance(material, RSAPublicKey) and material.key_size >= RSA_BITS_MIN:
        return "RS256"
    if isinstance(material, EllipticCurvePublicKey) and isinstance(material.curve, SECP256R1):
        return "ES256"
    if isinstance(material, Ed25519PublicKey):
        return "EdDSA"
    return None


def parse_jwks(text: bytes) -> Mapping[str | None, SigningKey]:
    """The signing keys of a JSON Web Key Set by `kid`; keys of other kinds and uses are left out. Raises ValueError."""
    keys: dict[str | None, SigningKey] = {}
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("it is not a JSON Web Key Set")
    for each in document["keys"]:
        if not isinstance(each, dict) or each.get("kty") not in ("RSA", "EC", "OKP") or "d" in each:
            continue  # A private key, or one that everybody who reads the set could sign with.
        kid = each.get("kid")
        operations = each.get("key_ops", ["verify"])
        if each.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
            continue
        try:
            material = jwt.PyJWK(each).key
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, NotImplementedError, UnsupportedAlgorithm):
            continue
        algorithm = _algorithm(material)
        if algorithm is not None and each.get("alg", algorithm) == algorithm and (kid is None or isinstance(kid, str)):
            keys[kid] = SigningKey(algorithm, material)
    return keys


class Jwks:
    """A key set behind a URL, kept and fetched again."""

    def __init__(self, url: str) -> None:
        """Raises SettingsError for a URL that anybody on the way could answer."""
        if _names_user(url):
            raise SettingsError("jwks_url has a user or a password in it, which would end up in logs")
        if not _is_trustworthy(url):
            raise SettingsError(f"jwks_url = {url!r}: it must be https://, or http:// on this machine")
        self.url = url
        self._keys: Mapping[str | None, SigningKey] = {}
        self._fetched: float | None = None
        """When the keys were had, in Unix seconds."""
        self._tried = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when a key that was good is good no longer, or all of them were kept too long."""

    def find(self, kid: Any, now: float) -> SigningKey:
        """The key with that id; without one, the only key there is. Raises Unauthorized, KeysNeeded, Unavailable."""
        if self._fetched is None or now - self._fetched > JWKS_KEPT_S:
            if not self._may_help(now):
                raise Unavailable(
                    "the keys that tokens are signed with cannot be had now", retry_after=int(JWKS_PAUSE_S)
                )
            raise KeysNeeded
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        key = self._keys.get(kid) if kid is None or isinstance(kid, str) else None
        if key is not None:
            return key
        if self._may_help(now):
            raise KeysNeeded
        raise _refuse("its key is not in the key set")

    def _may_help(self, now: float) -> bool:
        """Whether it is of use to await `fetch`: one is under way already, or it is time for another."""
        return self._fetching is not None or self._may_try(now)

    def _may_try(self, now: float) -> bool:
        """Whether the last attempt is long enough ago; it is, if the clock was set back."""
        return not 0 <= now - self._tried < JWKS_PAUSE_S

    def is_stale(self, now: float) -> bool:
        """Whether it is time for another look at the URL."""
        fetched = self._tried if self._fetched is None else self._fetched
        return not 0 <= now - fetched <= JWKS_FRESH_S and self._may_try(now)

    async def fetch(self, now: float) -> None:
        """Get the key set; whoever asks meanwhile waits for the same. A failure is logged, and the old keys stay."""
        if self._fetching is None:
            if not self._may_try(now):
                return
            self._tried = now
            self._fetching = asyncio.create_task(self._fetch(now))
            self._fetching.add_done_callback(self._forget)
        await asyncio.shield(self._fetching)

    async def stop(self) -> None:
        """Give up a fetch that is under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _fetch(self, now: float) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=JWKS_TIMEOUT_S)
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(self.url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise ValueError(f"it answers {response.status}")
                text = await _read_body(response)
                keys = parse_jwks(text)
                if not keys:
                    raise ValueError("it has no key that tokens may be signed with")
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            log.warning("cannot get the key set", extra={"url": self.url, "error": str(error) or "time-out"})
            if self._fetched is not None and now - self._fetched > JWKS_KEPT_S:
                self.on_change()
            return
        before, self._keys, self._fetched = self._keys, keys, now
        if any(keys.get(kid) != key for kid, key in before.items()):
            self.on_change()


def _names_user(url: str) -> bool:
    try:
        return urlsplit(url).username is not None
    except ValueError:
        return False


def _is_trustworthy(url: str) -> bool:
    try:
        parts = urlsplit(url)
        if parts.scheme == "https":
            return bool(parts.hostname)
        return parts.scheme == "http" and (
            parts.hostname == "localhost" or ip_address(parts.hostname or "").is_loopback
        )
    except ValueError:
        return False


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    text = bytearray()
    async for chunk in response.content.iter_any():
        text += chunk
        if len(text) > JWKS_BYTES_MAX:
            raise ValueError(f"it is longer than {JWKS_BYTES_MAX} bytes")
    return bytes(text)
