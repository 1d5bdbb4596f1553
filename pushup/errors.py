"""Every error PushUp raises on purpose, each with the HTTP status and the stable code it is answered with.

The answer's form is RFC 9457 problem details: `title` and `status` follow from the status, `code` is what programs
compare, `detail` is the sentence for a person, and further members (`channel`, `parameter`, …) say where.
"""

from http import HTTPStatus
from typing import Any, ClassVar

import msgspec

PROBLEM_TYPE = "application/problem+json"


class PushUpError(Exception):
    """Base of the tree. `members` become members of the problem document."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members

    @property
    def title(self) -> str:
        """The status in words."""
        return HTTPStatus(self.status).phrase

    @property
    def headers(self) -> dict[str, str]:
        """Further headers of the answer."""
        return {"Retry-After": str(self.members["retry_after"])} if "retry_after" in self.members else {}

    def problem(self) -> dict[str, Any]:
        """The problem document as a JSON-ready dict."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.members,
        }

    def body(self) -> bytes:
        """The problem document, encoded."""
        return msgspec.json.encode(self.problem())


class SettingsError(PushUpError):
    """A setting is unknown or has a wrong value; the sentence names the setting. Never reaches HTTP."""

    code = "invalid_setting"


class InvalidRequest(PushUpError):
    """The request as a whole makes no sense: bad HTTP, bad JSON."""

    status = 400
    code = "invalid_request"


class InvalidParameter(InvalidRequest):
    """One named parameter or field is unknown or out of range."""

    code = "invalid_parameter"

    def __init__(self, parameter: str, detail: str) -> None:
        super().__init__(detail, parameter=parameter)


class Unauthorized(PushUpError):
    """No credentials, or none that are known where they were shown. Says nothing of whether the realm exists."""

    status = 401
    code = "unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        return {**super().headers, "WWW-Authenticate": 'Bearer realm="PushUp"'}


class TokenExpired(Unauthorized):
    """The token was good once; also the end of a poll that waited when it expired. Come back with a new one."""

    code = "token_expired"


class Forbidden(PushUpError):
    """The credentials are good, but not for this. Says nothing of whether the channel exists."""

    status = 403
    code = "forbidden"


class OriginNotAllowed(Forbidden):
    """A browser asks on behalf of a page of another site, which the settings do not name."""

    code = "origin_not_allowed"


class NotFound(PushUpError):
    """No such path."""

    status = 404
    code = "not_found"


class ChannelNotFound(NotFound):
    """The channel does not exist and does not come into being by being used."""

    code = "channel_not_found"

    def __init__(self, channel: str | int) -> None:
        super().__init__(f"channel {channel} does not exist", channel=channel)


class MethodNotAllowed(PushUpError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(PushUpError):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class ChannelExists(PushUpError):
    """Creating a channel whose name is taken."""

    status = 409
    code = "channel_exists"

    def __init__(self, channel: str | int) -> None:
        super().__init__(f"channel {channel} exists already", channel=channel)


class TooLarge(PushUpError):
    """A body, a message or a list is over its limit."""

    status = 413
    code = "too_large"


class KeyReused(PushUpError):
    """An idempotency key came back with a different publication."""

    status = 422
    code = "idempotency_key_reused"


class TooMany(PushUpError):
    """A limit on how many of something at once, or in a second; it passes."""

    status = 429
    code = "too_many"

    def __init__(self, detail: str, retry_after: int = 1) -> None:
        super().__init__(detail, retry_after=retry_after)


class TooManyConnections(TooMany):
    """The client's address has as many connections as one may have."""

    code = "too_many_connections"


class TooManyPolls(TooMany):
    """As many polls wait with this token as may."""

    code = "too_many_polls"


class TooManyPublications(TooMany):
    """The key or the token publishes faster than it may."""

    code = "too_many_publications"


class HeadTooLarge(PushUpError):
    """The request line and the header fields are over their limit."""

    status = 431
    code = "head_too_large"


class Unavailable(PushUpError):
    """The broker did not answer in time, or the node is going away; try again."""

    status = 503
    code = "unavailable"

    def __init__(self, detail: str, retry_after: int = 1) -> None:
        super().__init__(detail, retry_after=retry_after)


class BrokerRefused(Unavailable):
    """The broker would not do it: it lacks memory, or we lack a permission."""

    code = "broker_refused"


class RealmFull(Unavailable):
    """The realm's cached messages are over their limit; there is room again when some have expired."""

    code = "realm_full"
