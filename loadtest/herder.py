"""One process of clients, told by another what to do: `python -m loadtest.herder HOST PORT SOURCE TIMEOUT_S`.

SOURCE: the first three numbers of the addresses that its connections come from.

It hears commands, a line of JSON each, on its standard input, answers each with a line, and ends with its input.
"""

import http.client
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from loadtest.fleet import FleetError
from loadtest.herd import BURST, Address, Channel, Herd, Tally
from loadtest.machine import ran
from loadtest.results import percentile

CHANNEL: Final = "everybody"
PROBE_S: Final = 120.0
CONNECTIONS_A_SOURCE: Final = 4000
"""From one address to one server. The kernel looks for a free port one by one, and with half of them taken for long."""
QUIET_S: Final = 0.5
"""How long the clients listen on after the last answer, for what should not come."""


def serve(
    address: Address, source: str, timeout_s: int, lines: Iterable[str], answer: Callable[[Mapping[str, Any]], None]
) -> None:
    """Do what the lines say until they end.

    `{"do": "connect", "count", "published"}`: so many more clients poll, for what comes after the message of that
    number. `{"do": "expect", "due", "until"}`: the next message is due then (ns); tell what was heard of it.
    `{"do": "poll"}`: poll again.
    """
    channel = Channel(CHANNEL)
    with Herd(timeout_s, again=False) as herd:
        probe = http.client.HTTPConnection(*address, timeout=PROBE_S)
        for line in lines:
            command = json.loads(line)
            try:
                answer(_obey(command, herd, channel, address, source, probe))
            except (FleetError, OSError, http.client.HTTPException) as error:
                answer({"error": str(error)})
        probe.close()


def _obey(
    command: Mapping[str, Any],
    herd: Herd,
    channel: Channel,
    address: Address,
    source: str,
    probe: http.client.HTTPConnection,
) -> Mapping[str, Any]:
    if command["do"] == "connect":
        channel.published = channel.acknowledged = command["published"]
        for first in range(0, command["count"], BURST):
            last_byte = 1 + len(herd) // CONNECTIONS_A_SOURCE
            herd.add(address, channel, min(BURST, command["count"] - first), f"{source}.{last_byte}")
            # Not faster than the node takes them, so that the kernel turns none away.
            probe.request("GET", "/poll?channel=probe&start=latest&timeout=0")
            probe.getresponse().read()
        return {"connected": len(herd)}
    if command["do"] == "poll":
        herd.poll_again()
        return {}
    tally = herd.tally = Tally()
    begin = ran((os.getpid(),))
    herd.expect(channel, command["due"])
    herd.run(command["until"], enough=lambda: herd.unanswered <= 0)
    used = ran((os.getpid(),)) - begin
    herd.run(time.monotonic_ns() + int(QUIET_S * 1e9))
    herd.settle()
    lags = sorted(tally.lags)
    return {
        "latencies_us": [latency // 1000 for latency in tally.latencies],
        "lag_us": percentile(lags, 99) / 1000 if lags else 0.0,
        "cpu_ns": used.cpu,
        "waited_ns": used.waited,
        "messages_lost": tally.lost,
        "messages_repeated": tally.duplicates,
        "messages_gap": tally.gaps,
        "wrong": tally.wrong + tally.broken,
        "complaint": tally.complaint,
    }


def _main() -> None:
    host, port, source, timeout_s = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    serve(
        (host, int(port)),
        source,
        int(timeout_s),
        sys.stdin,
        lambda said: print(json.dumps(said, separators=(",", ":")), flush=True),
    )


if __name__ == "__main__":
    _main()
