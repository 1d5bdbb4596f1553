"""PushUp: a long-polling push server that any web stack can put in front of its browsers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pushup.version import __version__

if TYPE_CHECKING:
    from pushup.client import Client, Subscription
    from pushup.dialogue import Channel, Message
    from pushup.http_publisher import AsyncHttpPublisher, HttpPublisher
    from pushup.publisher import AsyncPublisher, Publisher
    from pushup.sync_client import SyncClient, SyncSubscription

__all__ = [
    "AsyncHttpPublisher",
    "AsyncPublisher",
    "Channel",
    "Client",
    "HttpPublisher",
    "Message",
    "Publisher",
    "Subscription",
    "SyncClient",
    "SyncSubscription",
    "__version__",
]

_PLACES = {
    "AsyncHttpPublisher": "pushup.http_publisher",
    "AsyncPublisher": "pushup.publisher",
    "Channel": "pushup.dialogue",
    "Client": "pushup.client",
    "HttpPublisher": "pushup.http_publisher",
    "Message": "pushup.dialogue",
    "Publisher": "pushup.publisher",
    "Subscription": "pushup.client",
    "SyncClient": "pushup.sync_client",
    "SyncSubscription": "pushup.sync_client",
}


def __getattr__(name: str) -> Any:
    # They bring redis-py or aiohttp along, for which those who do not ask should not wait.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'pushup' has no attribute {name!r}")
