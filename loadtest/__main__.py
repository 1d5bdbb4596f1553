"""`python -m loadtest list | run SCENARIO… | attack | report`."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

from loadtest import attack, attack_report
from loadtest.catalogue import catalogue
from loadtest.fleet import FleetError
from loadtest.progress import Progress, show_duration
from loadtest.results import Result, save
from loadtest.scenario import Scenario, run
from loadtest.servers import ServerError


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Measure PushUp and its peers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="say what can be measured")
    running = commands.add_parser("run", help="measure, and keep the raw results")
    running.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="see list")
    running.add_argument("--all", action="store_true", help="every scenario")
    running.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how well")
    running.add_argument("--rounds", type=int, metavar="N", help="rounds of each scenario, instead of its own number")
    running.add_argument("--no-pin", action="store_true", help="let the kernel choose the cores")
    running.add_argument(
        "--json", type=Path, metavar="FILE", help="write there, not to results/ (an array if scenarios are several)"
    )
    attacking = commands.add_parser("attack", help="measure good clients while others attack, make ATTACK.md")
    attacking.add_argument("--quick", action="store_true", help="few clients: shows that it works; print the report")
    attacking.add_argument("--pairs", type=int, metavar="N", help="calm and attack in turns so often")
    attacking.add_argument("--no-pin", action="store_true", help="let the kernel choose the cores")
    attacking.add_argument("--json", type=Path, metavar="FILE", help="the raw result; the report goes beside it")
    commands.add_parser("report", help="make REPORT.md from the newest result of each scenario, and ATTACK.md")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0, 1 if something could not be measured at all, 2 if it was called wrongly."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.command == "list":
        for name, scenario in catalogue().items():
            print(f"{name:20} {show_duration(scenario.seconds):>6}  {scenario.question}")
        return 0
    if parsed.command == "report":
        from loadtest.report import write  # With it comes matplotlib, which nobody who measures needs.

        try:
            print(f"wrote {write(catalogue()).name}")
            if attack_report.RAW.exists():
                print(f"wrote {attack_report.write().name}")
        except FileNotFoundError as error:
            print(f"loadtest: {error}", file=sys.stderr)
            return 1
        return 0
    if parsed.command == "attack":
        if parsed.pairs is not None and parsed.pairs < 1:
            parser.error("--pairs is 1 or more")
        return _attack(parsed.quick, parsed.pairs, not parsed.no_pin, parsed.json)
    known = catalogue(quick=parsed.quick)
    names = list(known) if parsed.all else list(dict.fromkeys(parsed.scenarios))
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        parser.error(f"no such scenario: {', '.join(wrong)}" if wrong else "name a scenario, or say --all")
    if parsed.rounds is not None and parsed.rounds < 1:
        parser.error("--rounds is 1 or more")
    try:
        return _run([known[name] for name in names], parsed.rounds, parsed.quick, not parsed.no_pin, parsed.json)
    except KeyboardInterrupt:
        return 130


def _run(scenarios: Sequence[Scenario], rounds: int | None, quick: bool, pin: bool, file: Path | None) -> int:
    """Run one after the other and keep each result at once; the exit status. One that cannot be run stops no other."""
    progress = Progress([scenario.seconds for scenario in scenarios])
    results: list[Result] = []
    for scenario in scenarios:
        command = f"python -m loadtest run {scenario.name}{' --quick' if quick else ''}"
        command += f"{'' if rounds is None else f' --rounds {rounds}'}{'' if pin else ' --no-pin'}"
        try:
            result = run(
                scenario,
                scenario.rounds if rounds is None else rounds,
                quick=quick,
                pin=pin,
                command=command,
                share=progress.share,
                note=partial(progress.note, scenario.name),
            )
        except (ServerError, OSError) as error:
            print(f"loadtest: {scenario.name}: {error}", file=sys.stderr)
            continue
        finally:
            progress.next()
        results.append(result)
        if file is None:
            print(f"wrote results/{save(result).name}")
        elif len(scenarios) == 1:
            save(result, file)
    if file is not None and len(scenarios) > 1:
        file.write_text(json.dumps([result.to_json() for result in results], ensure_ascii=False) + "\n")
    return 0 if len(results) == len(scenarios) and all(map(_complete, results, scenarios)) else 1


def _attack(quick: bool, pairs: int | None, pin: bool, file: Path | None) -> int:
    plan = attack.QUICK if quick else attack.FULL
    command = f"python -m loadtest attack{' --quick' if quick else ''}{'' if pin else ' --no-pin'}"
    if pairs is not None:
        plan = replace(plan, pairs=pairs)
        command += f" --pairs {pairs}"
    try:
        result = attack.run(
            plan, quick=quick, pin=pin, command=command, note=lambda line: print(line, file=sys.stderr, flush=True)
        )
    except (attack.AttackError, FleetError, ServerError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if quick and file is None:
        print(attack_report.render("", result))
    else:
        raw = attack_report.save(result, file or attack_report.RAW)
        print(f"wrote {raw.name}, {attack_report.write(raw).name}")
    return 0 if all(target["met"] for target in attack_report.judge(result)) else 1


def _complete(result: Result, scenario: Scenario) -> bool:
    """Whether every case was measured at least once on every server that should not fail."""
    wanted = {(one.case, one.server) for one in result.measurements if one.server not in scenario.may_fail}
    return wanted <= {(one.case, one.server) for one in result.measurements if not one.failure}


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
