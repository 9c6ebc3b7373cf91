"""The whole zoo, a forked process for each specimen with a limit on its time, and a file of records to go on from."""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tests.zoo import peers as inductor
from tests.zoo.build import Implementation, Specimen, specimens
from tests.zoo.measure import Record, measure, versions
from tests.zoo.score import is_exported, score

Job = tuple[Specimen, Implementation]


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        results: a file of records, one JSON object a line; what is in it is not run again.
        workers: processes at a time.
        limit: seconds a specimen may take.
        verify: whether kreg runs every site old against new.
        peers: whether Inductor's patterns are counted too.
        again: whether what is recorded is run again where something was left: not built, exported, raised or verified.
    """

    results: Path
    workers: int = 2
    limit: float = 240.0
    verify: bool = True
    peers: bool = True
    again: bool = False


def jobs(
    families: Sequence[str] = (), implementations: Sequence[Implementation] = ("eager", "sdpa"), only: str = "*"
) -> list[Job]:
    """What to run: every architecture but aliases, all in the first implementation before any in the second."""
    chosen = [s for s in specimens() if not s.alias_of and (not families or s.family in families)]
    chosen = [s for s in chosen if fnmatch.fnmatch(s.id, only) or fnmatch.fnmatch(s.name, only)]
    return [(specimen, implementation) for implementation in implementations for specimen in chosen]


def run(todo: Sequence[Job], options: Options, say: Callable[[str], None] = print) -> None:
    """Runs jobs and appends their records to the results, which hold what was done before."""
    recorded = records(options.results)
    done = {(record["id"], record["implementation"]) for record in recorded if not options.again or _is_right(record)}
    todo = [job for job in todo if (job[0].id, job[1]) not in done]
    say(f"{len(todo)} to run, {len(done)} recorded in {options.results}")
    if not todo:
        return
    import transformers  # noqa: F401  # once, before the processes are forked

    if options.peers:
        inductor.prepare()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    common = {"versions": versions(), "verified": options.verify}
    with options.results.open("a") as results:
        for count, record in enumerate(_each(todo, options), 1):
            results.write(json.dumps(record | common) + "\n")
            results.flush()
            say(f"{count}/{len(todo)} {record['id']} {record['implementation']}: {_line(record)}")


def records(path: Path) -> list[Record]:
    """The records of a file, the last one of a specimen and implementation where there are several."""
    if not path.exists():
        return []
    read = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({(record["id"], record["implementation"]): record for record in read}.values())


@dataclass
class _Running:
    process: Any
    connection: Connection
    deadline: float
    record: Record


def _each(todo: Sequence[Job], options: Options) -> Iterator[Record]:
    """Records in the order they are ready."""
    fork = multiprocessing.get_context("fork")
    waiting = list(todo)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < options.workers:
            specimen, implementation = waiting.pop(0)
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(theirs, specimen, implementation, options), daemon=True)
            process.start()
            theirs.close()
            running.append(
                _Running(process, ours, time.monotonic() + options.limit, _started(specimen, implementation))
            )
        wait([job.connection for job in running], timeout=1.0)
        for job in list(running):
            if _finished(job):
                running.remove(job)
                yield job.record


def _finished(job: _Running) -> bool:
    try:
        while job.connection.poll():
            job.record = json.loads(job.connection.recv_bytes())
        if time.monotonic() <= job.deadline:
            return False
        job.record["failed"] = f"took too long in the stage {job.record['stage']!r}"
        job.process.kill()
    except (EOFError, OSError):
        job.process.join()
        if job.record["stage"] != "done" and "failed" not in job.record:
            job.record["failed"] = f"the process ended in the stage {job.record['stage']!r}: {job.process.exitcode}"
    job.process.join()
    job.connection.close()
    return True


def _started(specimen: Specimen, implementation: Implementation) -> Record:
    return {
        "id": specimen.id,
        "name": specimen.name,
        "family": specimen.family,
        "model_class": specimen.model_class,
        "alias_of": specimen.alias_of,
        "implementation": implementation,
        "stage": "build",
        "seconds": {},
    }


def _child(connection: Connection, specimen: Specimen, implementation: Implementation, options: Options) -> None:
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what exporters print about a failure is in its record
    os.dup2(nowhere, 2)

    def tell(record: Record) -> None:
        connection.send_bytes(json.dumps(record).encode())

    tell(measure(specimen, implementation, verify=options.verify, peers=options.peers, tell=tell))
    connection.close()


def _is_right(record: Record) -> bool:
    without = "no SDPA form" in record.get("failed", "")
    return without or (is_exported(record) and score(record).right and "failed" not in record)


def _line(record: Record) -> str:
    if "failed" in record:
        return f"no ({record['stage']}): {record['failed'][:160]}"
    told = score(record)
    return (
        f"{told.raised} of {told.attentions} attentions raised, {told.verified} verified; "
        f"{told.indexers_raised} of {told.indexers} indexers; {len(record['near_misses'])} near misses"
    )
