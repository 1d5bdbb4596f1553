"""PushUp: a long-polling push server that any web stack can put in front of its browsers."""

from pushup.version import __version__

__all__ = ["__version__"]
