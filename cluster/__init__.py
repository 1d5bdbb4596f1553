"""Operates many PushUp nodes on one machine, from outside and without Docker: Redis, nodes and HAProxy.

`python -m cluster up --nodes 4` for people, `Cluster` for programs. It knows the nodes by their command line, their
admin listener and their signals, as any operator would.
"""

from cluster.errors import ClusterError, Refused
from cluster.operate import Cluster

__all__ = ["Cluster", "ClusterError", "Refused"]
