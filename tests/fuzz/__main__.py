"""The long run: ``python -m tests.fuzz --examples 10000``. Ends with 1 and the simplest program that came out wrong."""

from __future__ import annotations

import argparse
import logging
import random
import subprocess
import sys
import time

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.expected import missing_ops
from tests.fuzz.forms import Program
from tests.fuzz.judge import judge
from tests.fuzz.strategies import programs
from tests.fuzz.tally import Tally


def arguments() -> argparse.Namespace:
    """What was asked on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000, help="programs to draw")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the programs, each with its seed")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; printed, so that a run can be repeated")
    parser.add_argument("--every", type=int, default=500, help="programs between two lines of progress")
    parser.add_argument("--raised", action="store_true", help="also stop at a plain form that is not rewritten")
    return parser.parse_args()


def run(examples: int, seed: int, every: int, raised: bool, tally: Tally) -> None:
    """Draws and judges programs.

    Raises:
        AssertionError: a program came out wrong; hypothesis has made it as simple as it can.
    """
    start = time.perf_counter()
    found = False

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs())
    def one(program: Program) -> None:
        nonlocal found
        verdict = judge(program)
        if not found:  # what is tried while a failure is made simpler is not part of the sample
            tally.add(program, verdict)
            done = sum(tally.total.values())
            if done % every == 0:
                print(f"{done:7} {time.perf_counter() - start:7.0f} s  {dict(tally.total)}", flush=True)
        missed = missing_ops(program, verdict.raised) if raised and verdict.kind in ("rewritten", "untouched") else []
        found = found or verdict.kind == "wrong" or bool(missed)
        assert verdict.kind != "wrong", f"{verdict.detail} (raised: {verdict.raised}, kept: {verdict.reasons})"
        assert not missed, f"{missed} not raised: {verdict.reasons}"

    one()


def shared(asked: argparse.Namespace, seed: int) -> int:
    """The programs in several processes; 1 if any of them found one that is wrong."""
    share = ["--examples", str(-(-asked.examples // asked.workers)), "--every", str(asked.every)]
    share += ["--raised"] if asked.raised else []
    command = [sys.executable, "-m", "tests.fuzz", *share, "--seed"]
    running = [subprocess.Popen([*command, str(seed + i)]) for i in range(asked.workers)]
    return max(worker.wait() for worker in running)


def main() -> int:
    """Runs, prints the table, and says what is wrong, if anything is."""
    asked = arguments()
    seed = random.randrange(2**32) if asked.seed is None else asked.seed
    if asked.workers > 1:
        return shared(asked, seed)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(f"seed {seed}", flush=True)
    tally = Tally()
    try:
        run(asked.examples, seed, asked.every, asked.raised, tally)
    except AssertionError as error:
        print(tally.table())
        print("\n".join((str(error), *getattr(error, "__notes__", ()))))
        return 1
    print(tally.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
