"""Pages of other origins: which of them may use this node, and the header fields that say so (CORS).

A browser sends `Origin` with whatever a page of another site asks for that could change something. A page of the same
host, and every client that is no browser, passes.
"""

import re
from typing import Final

ANY: Final = "*"
NOT_ALLOWED: Final = "pages of this origin may not use this service; its cors_origins do not name it"
PREFLIGHT_MAX_AGE_S: Final = 7200
"""The most that Chromium keeps."""

_ORIGIN: Final = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class Origins:
    """An allow-list: `https://example.com, https://app.example.com:8443`, or `*`."""

    def __init__(self, text: str) -> None:
        """Raises ValueError with the rest of a sentence."""
        self._allowed = frozenset(filter(None, (part.strip() for part in text.split(","))))
        for origin in self._allowed - {ANY}:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin} is not an origin, which is a scheme and a host, in lower case and without a path"
                )

    def allows(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may use a service that the request calls `host`."""
        return ANY in self._allowed or self.knows(origin, host)

    def knows(self, origin: str, host: str) -> bool:
        """The same by name: such a page may also come with the browser's cookies."""
        return origin in self._allowed or (host != "" and origin.partition("://")[2] == host.lower())

    def headers(self, origin: str | None) -> dict[str, str]:
        """What an answer to a page of this origin has to say; nothing if it may not read it."""
        if origin is None or not self._allowed:
            return {}
        if origin in self._allowed:
            return {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Credentials": "true",
                "Access-Control-Expose-Headers": "Retry-After",
                "Vary": "Origin",
            }
        if ANY in self._allowed:
            return {"Access-Control-Allow-Origin": ANY, "Access-Control-Expose-Headers": "Retry-After"}
        return {"Vary": "Origin"}

    def preflight(self, origin: str) -> dict[str, str] | None:
        """The same for a browser that asks beforehand; None if the page may not."""
        headers = self.headers(origin)
        if "Access-Control-Allow-Origin" not in headers:
            return None
        return {
            **headers,
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key",
            "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_S),
        }
