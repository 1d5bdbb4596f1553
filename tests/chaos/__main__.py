"""`python -m tests.chaos [FAULT...]`: run faults, write REPORT.md, exit with 1 if the promise was broken."""

import argparse
import asyncio
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from tests.chaos.faults import FAULTS, Fault, hosting
from tests.chaos.report import REPORT, keep, render
from tests.chaos.trial import Plan, Result, run

DEFAULTS = Plan()
LISTED = [name for name, fault in FAULTS.items() if not fault.extra]
EXTRA = [name for name, fault in FAULTS.items() if fault.extra]


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Break a cluster in every way while clients publish and poll, and prove that nothing is lost.",
        epilog=f"Faults: {', '.join(LISTED)}. Only when named: {', '.join(EXTRA)}.",
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="which of them; the former, if none is named")
    parser.add_argument("--seed", type=int, metavar="N", help="what everything random follows from")
    for name, help in (
        ("rounds", "how often each fault happens"),
        ("pollers", "how many clients poll"),
        ("channels", "how many channels are published to"),
        ("nodes", "how many nodes there are"),
    ):
        default = getattr(DEFAULTS, name)
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=f"{help} [{default}]")
    parser.add_argument(
        "--rate", type=float, metavar="N", default=DEFAULTS.rate, help=f"publications per second [{DEFAULTS.rate:g}]"
    )
    parser.add_argument("--no-report", action="store_true", help="leave REPORT.md and the raw results as they are")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0, 1 if something was wrong, 2 if it was called wrongly."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    wrong = [name for name in parsed.faults if name not in FAULTS]
    if wrong:
        parser.error(f"no such fault: {', '.join(wrong)}")
    if min(parsed.rounds, parsed.pollers, parsed.channels, parsed.nodes) < 1 or parsed.rate <= 0:
        parser.error("numbers are 1 or more")
    seed = random.SystemRandom().randrange(1_000_000) if parsed.seed is None else parsed.seed
    plan = Plan(
        channels=parsed.channels, pollers=parsed.pollers, nodes=parsed.nodes, rounds=parsed.rounds, rate=parsed.rate
    )
    print(f"seed {seed}", flush=True)
    bad = []
    for name in parsed.faults or LISTED:
        started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        result = _run(FAULTS[name], plan, seed)
        print(_summary(result), flush=True)
        if not result.good:
            bad.append(name)
        if not parsed.no_report:
            raw = {**result.to_json(), "started": started, "commit": _commit()}
            kept = keep({name: raw}, list(FAULTS))
            REPORT.write_text(render(kept, FAULTS))
    if bad:
        print(f"the promise was broken: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


def _run(fault: Fault, plan: Plan, seed: int) -> Result:
    directory = Path(tempfile.mkdtemp(prefix="pushup-chaos-"))
    with hosting(fault, plan.nodes, directory) as service, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(
            run(
                fault.name,
                lambda scene: fault.inject(scene, service),
                service,
                plan,
                seed,
                cuts=fault.cuts,
                say=lambda line: print(f"  {line}", flush=True),
            )
        )
    if result.good:
        shutil.rmtree(directory)
    else:
        print(f"  logs are kept in {directory}", flush=True)
    return result


def _summary(result: Result) -> str:
    verdict = result.verdict
    wrongs = ", ".join(f"{count} {kind}" for kind, count in verdict.wrongs.items() if count) or "nothing wrong"
    lines = [
        f"{result.fault}: {verdict.acknowledged} acknowledged, {verdict.unknown} unknown, {verdict.refused} refused, "
        f"{verdict.deliveries} deliveries, {verdict.true_gaps} gaps ({verdict.felt_gaps} over a loss), {wrongs}; "
        f"slowest {verdict.slowest_s:.1f} s, {result.seconds:.0f} s, client {result.busy:.0%} busy"
    ]
    return "\n  ".join(lines + result.failures + verdict.evidence)


def _commit() -> str:
    """The state of the code, marked if it differs from what is committed."""
    here = Path(__file__).parent
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
