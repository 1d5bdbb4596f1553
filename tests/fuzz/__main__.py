"""`python -m tests.fuzz lane|parsers [FLAG ...] [CORPUS ...]`: a coverage-guided fuzzer with the flags of libFuzzer."""

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

HERE = Path(__file__).parent


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    # Only what is imported here is watched: all of pushup, and nothing of what else the targets need.
    with atheris.instrument_imports(include=["pushup"]):
        from tests.fuzz.lane import LaneTarget
        from tests.fuzz.parsers import fuzz_parsers
    target: Callable[[bytes], None]
    if name == "lane":
        target = LaneTarget()
    elif name == "parsers":
        target = fuzz_parsers
    else:
        sys.exit(__doc__)
    # libFuzzer starts itself again by this when it merges or minimises.
    atheris.Setup([f"{sys.executable} -m tests.fuzz {name}", f"-dict={HERE / 'dictionary.txt'}", *arguments], target)
    atheris.Fuzz()


main()
