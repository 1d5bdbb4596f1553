"""PushUp: a long-polling push server that any web stack can put in front of its browsers."""

__version__ = "0.1.0"
