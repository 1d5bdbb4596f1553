"""Publications as programs write them: any JSON value, one channel or several; and the results of many."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from pushup.errors import InvalidParameter, InvalidRequest, PushUpError
from pushup.messages import KEY_LENGTH_MAX, NESTING_MAX, Publication, Receipt, nests_too_deep, parse_channel

Channels = str | int | Sequence[str | int]
"""One channel or several: a name, or the integer that was handed out."""


def make_publication(channels: Any, data: Any, key: Any = None) -> Publication:
    """A publication of any JSON value; NaN and infinities, which JSON has not, become null. Raises InvalidParameter."""
    try:
        names = [channels] if isinstance(channels, str | int) else list(channels)
    except TypeError:
        names = [None]
    if not names:
        raise InvalidParameter("channels", "a publication names at least one channel")
    if isinstance(channels, bytes) or not all(isinstance(name, str | int) for name in names):
        raise InvalidParameter("channels", "a channel is a string, or an integer that was handed out")
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= KEY_LENGTH_MAX and _is_unicode(key)):
        raise InvalidParameter("key", f"key is a string of 1 to {KEY_LENGTH_MAX} characters")
    try:
        text = msgspec.json.encode(data)
        deep = nests_too_deep(text, msgspec.json.decode(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter("data", f"data cannot be JSON: {error}") from None
    if deep:
        raise InvalidParameter("data", f"the data is nested more than {NESTING_MAX} levels deep")
    return Publication(tuple(dict.fromkeys(map(parse_channel, names))), text, key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def make_publications(items: Iterable[Mapping[str, Any]]) -> list[Publication | PushUpError]:
    """Items as HTTP publishers send them; one that is wrong is its error, and spoils no other."""
    made: list[Publication | PushUpError] = []
    for item in items:
        try:
            if not isinstance(item, Mapping):
                raise InvalidRequest("a publication is a mapping with channels, data and perhaps a key")
            unknown = item.keys() - {"channels", "data", "key"}
            if unknown or "data" not in item:
                name = min(unknown, default="data")
                raise InvalidParameter(name, f"{name} is {'not a field of a publication' if unknown else 'missing'}")
            made.append(make_publication(item.get("channels", ()), item["data"], item.get("key")))
        except PushUpError as error:
            made.append(error)
    return made


def only(results: Sequence[Receipt | PushUpError]) -> int:
    """The id of the one message published, or its error raised."""
    (result,) = results
    if isinstance(result, PushUpError):
        raise result
    return result.id
