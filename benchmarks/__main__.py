"""`python -m benchmarks`: measure, plot and report; each part also alone."""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import TypeVar

import anyio
import msgspec
from cyclopts import App

from ampd.testing.shared_server import shared_server
from benchmarks.compare import compare as compare_peers
from benchmarks.growth import growth as grow
from benchmarks.growth import growth_report
from benchmarks.herd import herd as stampede
from benchmarks.herd import herd_report
from benchmarks.plot import peers_plot, stall_plot
from benchmarks.record import RESULTS, PeersRecord, StallRecord, TimingsRecord, load, save
from benchmarks.report import peers_report, stall_report
from benchmarks.server import Server, server
from benchmarks.service import service as serve
from benchmarks.service import service_report
from benchmarks.stall import stall as stall_readers
from benchmarks.templates import templates as measure_templates
from benchmarks.tenants import tenants as migrate_tenants
from benchmarks.tenants import tenants_report

app = App(name="benchmarks", help="Measure ampd beside its peers.")

T = TypeVar("T")
QUICK_ROUNDS = {0.0: 1, 0.005: 1}  # of so few nothing can be said but that a part works


@app.default
def everything(url: str | None = None, *, quick: bool = False) -> None:
    """Measure everything and print the report.

    Parameters
    ----------
    url
        The superuser's URL of a server to measure against, instead of a managed local one.
    quick
        Fewer rounds, processes, files and schemas, and no stall: to see whether something has become far slower.
    """
    compare(url, quick=quick)
    growth(url, quick=quick)
    herd(url, quick=quick)
    service(url, quick=quick)
    tenants(url, quick=quick)
    if not quick:
        stall(url)
    report()


@app.command
def compare(url: str | None = None, *, quick: bool = False) -> None:
    """Measure ampd and its peers on the same folder, over several distances."""

    async def measure(at: Server) -> PeersRecord:
        return await (compare_peers(at, QUICK_ROUNDS, start_rounds=10, longest_wait=3) if quick else compare_peers(at))

    record = _measured(url, measure, "peers")
    (RESULTS / "peers.svg").write_text(peers_plot(record))


@app.command
def stall(url: str | None = None) -> None:
    """Measure how long other readers wait while a migration waits for one of them."""
    record = _measured(url, stall_readers, "stall")
    (RESULTS / "stall.svg").write_text(stall_plot(record))


@app.command
def growth(url: str | None = None, *, quick: bool = False) -> None:
    """Measure thousands of migrations beside psql."""
    _measured(url, lambda at: grow(at, (100, 1_000), rounds=1) if quick else grow(at), "growth")


@app.command
def herd(url: str | None = None, *, quick: bool = False) -> None:
    """Measure many processes that start at once."""
    _measured(url, lambda at: stampede(at, (1, 10), large=None) if quick else stampede(at), "herd")


@app.command
def service(url: str | None = None, *, quick: bool = False) -> None:
    """Measure what a run with nothing pending costs a service."""
    _measured(url, lambda at: serve(at, (100,)) if quick else serve(at), "service")


@app.command
def tenants(url: str | None = None, *, quick: bool = False) -> None:
    """Measure hundreds of schemas with a few migrations each."""
    _measured(url, lambda at: migrate_tenants(at, 50) if quick else migrate_tenants(at), "tenants")


@app.command
def templates(url: str | None = None) -> None:
    """Print what a database costs a test of the plugin for pytest, by default on the server that the plugin starts."""
    with nullcontext(url) if url else shared_server("benchmarks") as server_url:
        print(anyio.run(measure_templates, server_url))


@app.command
def report() -> None:
    """Print the tables of the last run of each part as Markdown."""
    print(peers_report(load("peers", PeersRecord)))
    print(stall_report(load("stall", StallRecord)))
    for name, title, table in (
        ("growth", "Thousands of migrations", growth_report),
        ("herd", "Many processes at once", herd_report),
        ("service", "In a service, on a current schema", service_report),
        ("tenants", "Tenants", tenants_report),
    ):
        print(f"\n### {title}\n", *table(load(name, TimingsRecord)), sep="\n")


def _measured(url: str | None, part: Callable[[Server], Awaitable[T]], name: str) -> T:
    """Run a part on a server, keep its record under a name, and return it."""

    async def measure() -> T:
        async with server(url) as at:
            return await part(at)

    record = anyio.run(measure)
    assert isinstance(record, msgspec.Struct)
    save(record, name)
    return record


if __name__ == "__main__":
    app()
