"""Many processes at once, as a rollout starts them: on an empty database, and on a current one."""

import asyncio
import os
from asyncio import create_subprocess_exec
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.compare import BYTECODE_KEPT
from benchmarks.peers import AMPD, PEERS, Subject, obtain
from benchmarks.record import Timing, TimingsRecord, facts
from benchmarks.server import Server
from benchmarks.workload import workload

DATABASE = "bench_herd"
SIZES = (1, 10, 50)
LARGE = 200  # more than the server has connections for; of ampd alone
AMONG = ("goose", "sqlx", "dbmate", "golang-migrate", "tern")
EMPTY, CURRENT = "empty", "current"


async def herd(server: Server, sizes: Sequence[int] = SIZES, large: int | None = LARGE) -> TimingsRecord:
    """Starts so many of each program at once on an empty database, and again when it is current."""
    found = [obtain(peer) for peer in PEERS if peer.name in AMONG]
    subjects = [AMPD, *(peer for peer in found if isinstance(peer, Subject))]
    scripts, url, timings = workload(), server.url_of(DATABASE), []
    with TemporaryDirectory() as scratch:
        for subject in subjects:
            folder = Path(scratch, subject.name)
            folder.mkdir()
            subject.lay_out(scripts, folder)
            for size in [*sizes, large] if large and subject is AMPD else sizes:
                await server.create_anew(DATABASE)
                for state in (EMPTY, CURRENT):
                    begin = perf_counter()
                    exits = await asyncio.gather(*(_exit_code(subject, url, folder) for _ in range(size)))
                    seconds, failures = perf_counter() - begin, sum(code != 0 for code in exits)
                    timings.append(Timing(subject.name, f"{size} {state}", 0, seconds, failures))
    return TimingsRecord(facts(await server.release()), timings)


async def _exit_code(subject: Subject, url: str, folder: Path) -> int:
    environment = os.environ | BYTECODE_KEPT | {subject.url_variable: url}
    process = await create_subprocess_exec(
        *subject.argv(url), cwd=folder, env=environment, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
    )
    return await process.wait()


def herd_report(record: TimingsRecord) -> Iterator[str]:
    """Yield a table: a row for each program, a column for each number of processes and state of the database."""
    cases = list(dict.fromkeys(timing.case for timing in record.timings))
    yield f"|  | {' | '.join(cases)} |"
    yield f"| :-- |{' --: |' * len(cases)}"
    for subject in dict.fromkeys(timing.subject for timing in record.timings):
        found = {timing.case: timing for timing in record.timings if timing.subject == subject}
        yield f"| {subject} | {' | '.join(_cell(found.get(case)) for case in cases)} |"


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return ""
    return f"{timing.seconds:.1f} s" + (f", **{timing.failures} failed**" if timing.failures else "")
