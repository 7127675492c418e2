"""What a run of the benchmark leaves behind: plain values that the report and the plots are made from."""

import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

import msgspec

RESULTS = Path(__file__).parent / "results"

Scenario = Literal["fresh", "nothing pending", "start"]
FLOOR = "floor"
Recorded = TypeVar("Recorded", bound=msgspec.Struct)


class Facts(msgspec.Struct, frozen=True):
    """Where and when the figures were taken."""

    date: str
    cores: int
    system: str
    python: str
    postgresql: str
    asyncpg: str


class Sample(msgspec.Struct, frozen=True):
    """One process, from its start to its end."""

    subject: str
    scenario: Scenario
    delay_ms: float
    round: int
    seconds: float
    connections: int = 0
    round_trips: int = 0


class PeersRecord(msgspec.Struct, frozen=True):
    """Every sample of one comparison on one folder; `absent` tells which peers are missing and why."""

    facts: Facts
    migrations: int
    releases: dict[str, str]
    absent: dict[str, str]
    samples: list[Sample]

    def delays(self, subject: str | None = None, scenario: Scenario | None = None) -> list[float]:
        """The one-way delays in milliseconds, ascending, at which anything was measured, or a subject in a scenario."""
        return sorted(
            {
                sample.delay_ms
                for sample in self.samples
                if subject in (None, sample.subject) and scenario in (None, sample.scenario)
            }
        )

    def median(
        self, subject: str, scenario: Scenario, delay_ms: float, of: Callable[[Sample], float] = lambda s: s.seconds
    ) -> float:
        """The median of one figure over all rounds."""
        return median(of(sample) for sample in self._rounds(subject, scenario, delay_ms).values())

    def shortest(self, subject: str, scenario: Scenario, delay_ms: float) -> float:
        """The seconds of the fastest round."""
        return min(sample.seconds for sample in self._rounds(subject, scenario, delay_ms).values())

    def ratio(self, subject: str, to: str, scenario: Scenario, delay_ms: float) -> float:
        """How many times as long one subject takes as another: the median over the rounds, which pair them."""
        return median(self.ratios(subject, to, scenario, delay_ms))

    def ratios(self, subject: str, to: str, scenario: Scenario, delay_ms: float) -> list[float]:
        """The same for each round."""
        upper, lower = (self._rounds(name, scenario, delay_ms) for name in (subject, to))
        return [upper[number].seconds / lower[number].seconds for number in upper]

    def _rounds(self, subject: str, scenario: Scenario, delay_ms: float) -> dict[int, Sample]:
        wanted = subject, scenario, delay_ms
        return {s.round: s for s in self.samples if (s.subject, s.scenario, s.delay_ms) == wanted}


class Wait(msgspec.Struct, frozen=True, array_like=True):
    """One read that had to wait, in seconds since the reader that holds the table began."""

    start: float
    duration: float


class Stall(msgspec.Struct, frozen=True):
    """What the other readers felt while one subject migrated; reads too quick to notice are only counted."""

    subject: str
    migration_seconds: float
    reads: int
    worst_seconds: float
    waits: list[Wait]


class StallRecord(msgspec.Struct, frozen=True):
    """Stalls of the same length of holding, each on a database of its own."""

    facts: Facts
    hold_seconds: float
    migrate_at_seconds: float
    lock_timeout_seconds: float
    stalls: list[Stall]

    def hanging(self, stall: Stall) -> float:
        """The share of the time in which a reader had to wait for longer than is noticed, while the table was held."""
        hanging, until = 0.0, 0.0
        for wait in sorted(stall.waits, key=lambda wait: wait.start):
            end = wait.start + wait.duration
            hanging += max(0.0, end - max(until, wait.start))
            until = max(until, end)
        return hanging / min(stall.migration_seconds, self.hold_seconds - self.migrate_at_seconds)


class Timing(msgspec.Struct, frozen=True):
    """How long one subject took in one case, and how many of its processes failed."""

    subject: str
    case: str
    round: int
    seconds: float
    failures: int = 0


class TimingsRecord(msgspec.Struct, frozen=True):
    """Every timing of one part."""

    facts: Facts
    timings: list[Timing]

    def median(self, subject: str, case: str) -> float:
        """The median of the seconds of one subject in one case."""
        return median(each.seconds for each in self.timings if (each.subject, each.case) == (subject, case))


def facts(postgresql: str) -> Facts:
    """The facts of this machine, none of which names it."""
    return Facts(
        date=datetime.now(UTC).date().isoformat(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        postgresql=postgresql,
        asyncpg=version("asyncpg"),
    )


def save(record: msgspec.Struct, name: str) -> None:
    """Writes a record as JSON, a line per sample so that two runs can be compared."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_bytes(msgspec.json.encode(record).replace(b"},{", b"},\n{") + b"\n")


def load(name: str, kind: type[Recorded]) -> Recorded:
    """Reads a record that `save` wrote."""
    return msgspec.json.decode((RESULTS / f"{name}.json").read_bytes(), type=kind)
