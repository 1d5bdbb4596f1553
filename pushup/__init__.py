"""PushUp: a long-polling push server that any web stack can put in front of its browsers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pushup.version import __version__

if TYPE_CHECKING:
    from pushup.publisher import AsyncPublisher, Publisher

__all__ = ["AsyncPublisher", "Publisher", "__version__"]


def __getattr__(name: str) -> Any:
    # The publishers bring redis-py along, for which a node without Redis should not wait.
    if name in ("AsyncPublisher", "Publisher"):
        return getattr(import_module("pushup.publisher"), name)
    raise AttributeError(f"module 'pushup' has no attribute {name!r}")
