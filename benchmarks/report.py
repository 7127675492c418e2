"""The records as Markdown tables."""

from collections.abc import Iterator, Sequence
from statistics import quantiles

from benchmarks.peers import AMPD
from benchmarks.record import FLOOR, PeersRecord, Scenario, StallRecord

FAR_MS = 10  # each way; nearer, what connecting costs would be lost in the noise


def peers_report(record: PeersRecord) -> str:
    """The comparison with the peers, ampd first and then from the fewest round trips to the most."""
    return "\n".join(_peers_lines(record))


def stall_report(record: StallRecord) -> str:
    """The worst wait of a reader under each subject."""
    return "\n".join(_stall_lines(record))


def _peers_lines(record: PeersRecord) -> Iterator[str]:
    facts = record.facts
    yield (
        f"{facts.date}, {facts.cores} cores, {facts.system}, PostgreSQL {facts.postgresql}, Python {facts.python}, "
        f"asyncpg {facts.asyncpg}. Medians of whole processes."
    )
    yield from _scenario(record, "nothing pending", "Nothing pending")
    yield from _scenario(record, "fresh", f"A fresh run of {record.migrations} migrations")
    yield f"\n### Process start\n\n{_start(record)}"
    yield "\nReleases: " + "; ".join(record.releases.values()) + "."
    for name, reason in record.absent.items():
        yield f"\n{name} is absent: {reason}."


def _scenario(record: PeersRecord, scenario: Scenario, title: str) -> Iterator[str]:
    delays = record.delays()
    yield f"\n### {title}\n"
    per_migration = ["per migration"] if scenario == "fresh" else []
    times = [f"{delay * 2:g} ms away" for delay in delays]
    included = ["connecting included"] if delays[-1] >= FAR_MS else []
    yield _row(["", "connections", "round trips", *per_migration, *included, *times])
    yield _row([":--", *["--:"] * (2 + len(per_migration) + len(included) + len(times))])
    for name in by_round_trips(record, scenario):
        trips = record.median(name, scenario, delays[0], lambda sample: sample.round_trips)
        connections = record.median(name, scenario, delays[0], lambda sample: sample.connections)
        share = [f"{trips / record.migrations:.2f}"] if per_migration else []
        whole = [_waits(record, name, scenario)] if included else []
        measured = record.delays(name, scenario)
        times = [_duration(record.median(name, scenario, delay)) if delay in measured else "" for delay in delays]
        yield _row([name, f"{connections:g}", f"{trips:g}", *share, *whole, *times])


def _waits(record: PeersRecord, name: str, scenario: Scenario) -> str:
    near, far = (record.delays(name, scenario)[end] for end in (0, -1))
    if far < FAR_MS:
        return ""
    seconds = record.shortest(name, scenario, far) - record.shortest(name, scenario, near)
    return f"{seconds / (far - near) * 500:.0f}"


def _start(record: PeersRecord) -> str:
    ampd, floor = (record.median(name, "start", 0) for name in (AMPD.name, FLOOR))
    ratios = record.ratios(AMPD.name, FLOOR, "start", 0)
    low, middle, high = quantiles(ratios, n=4)
    return (
        f"`ampd migrate` with nothing pending takes {middle:.3f} times as long as a script that imports the four "
        f"packages, connects, selects 1 and exits (quartiles of {len(ratios)} pairs {low:.3f} and {high:.3f}; medians "
        f"{_duration(ampd)} and {_duration(floor)})."
    )


def _stall_lines(record: StallRecord) -> Iterator[str]:
    yield (
        f"\n### Readers' stall\n\nA reader holds the table for {record.hold_seconds:g} s; "
        f"ampd's `lock_timeout_secs` is {record.lock_timeout_seconds:g}, its default.\n"
    )
    yield _row(["", "worst stall of another reader", "share of the time", "reads meanwhile", "the migration took"])
    yield _row([":--", "--:", "--:", "--:", "--:"])
    for stall in record.stalls:
        took = _duration(stall.migration_seconds)
        worst, share = _duration(stall.worst_seconds), f"{record.hanging(stall):.0%}"
        yield _row([stall.subject, worst, share, str(stall.reads), took])


def by_round_trips(record: PeersRecord, scenario: Scenario) -> list[str]:
    """ampd, then its peers from the fewest round trips to the most."""
    delay = record.delays()[0]

    def rank(name: str) -> tuple[bool, float]:
        return name != AMPD.name, record.median(name, scenario, delay, lambda sample: sample.round_trips)

    return sorted(record.releases, key=rank)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
