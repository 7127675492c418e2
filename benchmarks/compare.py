"""ampd beside its peers on one folder of migrations, and the start of `ampd migrate` beside the least that could be."""

import os
import sys
from asyncio import create_subprocess_exec
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TypeVar

from benchmarks.peers import AMPD, PEERS, Absent, Subject, obtain
from benchmarks.proxy import Proxy
from benchmarks.record import FLOOR, PeersRecord, Sample, Scenario, facts
from benchmarks.server import Server
from benchmarks.workload import LAST_RELATION, PreparedMigration, workload

FLOOR_SCRIPT = Path(__file__).with_name("floor.py")
DATABASE = "bench"
ROUNDS_BY_DELAY = {0.0: 3, 0.0005: 1, 0.0025: 2, 0.005: 2, 0.01: 1, 0.04: 1}  # from the nearest on
LONGEST_WAIT = 30.0  # seconds for the network; what would wait for longer is not measured at that distance
START_ROUNDS = 30
BYTECODE_KEPT = {"PYTHONDONTWRITEBYTECODE": ""}  # an installed package has its bytecode, a checkout should too

Item = TypeVar("Item")
SCENARIOS: tuple[Scenario, ...] = ("fresh", "nothing pending")


class CommandError(Exception):
    """A measured command did not do its work."""


async def compare(
    server: Server,
    rounds_by_delay: Mapping[float, int] = ROUNDS_BY_DELAY,
    start_rounds: int = START_ROUNDS,
    longest_wait: float = LONGEST_WAIT,
) -> PeersRecord:
    """Measures all subjects interleaved: each runs once in every round, and every round begins with another one."""
    found = [obtain(peer) for peer in PEERS]
    subjects = [AMPD, *(peer for peer in found if isinstance(peer, Subject))]
    scripts = workload()
    with TemporaryDirectory() as scratch:
        folders = {subject.name: _lay_out(subject, scripts, Path(scratch)) for subject in subjects}
        samples: list[Sample] = []
        async with Proxy(*server.address) as proxy:
            for delay, rounds in rounds_by_delay.items():
                for number in range(rounds):
                    _tell(f"round {number + 1} of {rounds}, {delay * 1000:g} ms each way")
                    for subject in _rotated(subjects, number):
                        waits = {s.scenario: s.round_trips * 2 * delay for s in samples if s.subject == subject.name}
                        scenarios = [scenario for scenario in SCENARIOS if waits.get(scenario, 0) <= longest_wait]
                        proxy.delay = delay
                        taken = _migrate_twice(server, proxy, subject, folders[subject.name], number, scenarios)
                        samples += [sample async for sample in taken]
        _tell("process start")
        samples += [sample async for sample in _starts(server, folders[AMPD.name], start_rounds)]
    return PeersRecord(
        facts=facts(await server.release()),
        migrations=len(scripts),
        releases={subject.name: subject.origin.release for subject in subjects},
        absent={peer.name: peer.reason for peer in found if isinstance(peer, Absent)},
        samples=samples,
    )


async def run(argv: Sequence[str], folder: Path, **environment: str) -> float:
    """Runs a command to its end and returns the seconds it took."""
    env = os.environ | BYTECODE_KEPT | environment
    begin = perf_counter()
    process = await create_subprocess_exec(*argv, cwd=folder, env=env, stdout=PIPE, stderr=STDOUT)
    output, _ = await process.communicate()
    seconds = perf_counter() - begin
    if process.returncode:
        raise CommandError(f"{' '.join(argv)}: exit {process.returncode}\n{output.decode()}")
    return seconds


async def _migrate_twice(
    server: Server, proxy: Proxy, subject: Subject, folder: Path, number: int, scenarios: Sequence[Scenario]
) -> AsyncIterator[Sample]:
    """Migrates an empty database, and once more; what is none of the scenarios runs unmeasured, and undelayed."""
    await server.create_anew(DATABASE)
    url, delay = server.url_of(DATABASE, through=proxy.port), proxy.delay
    for scenario in SCENARIOS:
        proxy.reset()
        proxy.delay = delay if scenario in scenarios else 0.0
        seconds = await run(subject.argv(url), folder, **{subject.url_variable: url})
        if scenario in scenarios:
            yield Sample(
                subject=subject.name,
                scenario=scenario,
                delay_ms=round(delay * 1000, 3),
                round=number,
                seconds=seconds,
                connections=proxy.connections,
                round_trips=proxy.round_trips,
            )
    async with server.connect(DATABASE) as connection:
        if await connection.fetchval("SELECT to_regclass($1) IS NULL", LAST_RELATION):
            raise CommandError(f"{subject.name} did not migrate")


async def _starts(server: Server, folder: Path, rounds: int) -> AsyncIterator[Sample]:
    url = server.url_of(DATABASE)
    environment = {AMPD.url_variable: url}
    contenders = [(AMPD.name, AMPD.argv(url)), (FLOOR, [sys.executable, str(FLOOR_SCRIPT), url])]
    await server.create_anew(DATABASE)
    await run(AMPD.argv(url), folder, **environment)
    for number in range(rounds):
        for name, argv in _rotated(contenders, number):
            seconds = await run(argv, folder, **environment)
            yield Sample(subject=name, scenario="start", delay_ms=0, round=number, seconds=seconds)


def _lay_out(subject: Subject, scripts: Sequence[PreparedMigration], scratch: Path) -> Path:
    folder = scratch / subject.name
    folder.mkdir()
    subject.lay_out(scripts, folder)
    return folder


def _rotated(items: Sequence[Item], by: int) -> Sequence[Item]:
    turn = by % len(items)
    return [*items[turn:], *items[:turn]]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
