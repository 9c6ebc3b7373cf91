"""The zoo's commands, from the root of the repository.

``python -m tests.zoo run`` measures all architectures, or goes on with a run that was stopped: what the file of results
holds is not measured again. ``python -m tests.zoo table`` writes ``docs/coverage.md`` from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.zoo.families import FAMILIES
from tests.zoo.run import Options, jobs, run

RESULTS = Path("build/zoo.jsonl")
PAGE = Path("docs/coverage.md")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure specimens and append their records to a file")
    running.add_argument("--family", action="append", default=[], choices=list(FAMILIES))
    running.add_argument("--only", default="*", help="a pattern of names or ids, such as 'gemma*' or 'audio/*'")
    running.add_argument("--implementation", action="append", choices=["eager", "sdpa"])
    running.add_argument("--workers", type=int, default=2)
    running.add_argument("--limit", type=float, default=240.0, help="seconds a specimen may take")
    running.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    running.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    running.add_argument("--again", action="store_true", help="run again what is recorded as not wholly raised")
    writing = commands.add_parser("table", help="write the page of coverage from the records")
    writing.add_argument("--page", type=Path, default=PAGE)
    for command in (running, writing):
        command.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "run":
        todo = jobs(arguments.family, arguments.implementation or ("eager", "sdpa"), arguments.only)
        options = Options(
            arguments.results,
            arguments.workers,
            arguments.limit,
            arguments.verify,
            arguments.peers,
            arguments.again,
        )
        run(todo, options)
    else:
        from tests.zoo.table import write

        write(arguments.results, arguments.page)


if __name__ == "__main__":
    main()
