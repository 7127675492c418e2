"""`python -m benchmarks`: measure, plot and report; each part also alone."""

import anyio
from cyclopts import App

from benchmarks.compare import compare as compare_peers
from benchmarks.plot import peers_plot, stall_plot
from benchmarks.record import RESULTS, PeersRecord, StallRecord, load, save
from benchmarks.report import peers_report, stall_report
from benchmarks.server import server
from benchmarks.stall import stall as stall_readers
from benchmarks.tenants import MIGRATIONS
from benchmarks.tenants import tenants as migrate_tenants

app = App(name="benchmarks", help="Measure ampd beside its peers.")


@app.default
def everything(url: str | None = None) -> None:
    """Measure everything and print the report.

    Parameters
    ----------
    url
        The superuser's URL of a server to measure against, instead of a managed local one.
    """
    compare(url)
    stall(url)
    report()


@app.command
def compare(url: str | None = None) -> None:
    """Measure ampd and its peers on the same folder."""

    async def measure() -> PeersRecord:
        async with server(url) as measured:
            return await compare_peers(measured)

    record = anyio.run(measure)
    save(record, "peers")
    (RESULTS / "peers.svg").write_text(peers_plot(record))


@app.command
def stall(url: str | None = None) -> None:
    """Measure how long other readers wait while a migration waits for one of them."""

    async def measure() -> StallRecord:
        async with server(url) as measured:
            return await stall_readers(measured)

    record = anyio.run(measure)
    save(record, "stall")
    (RESULTS / "stall.svg").write_text(stall_plot(record))


@app.command
def tenants(url: str | None = None, schemas: int = 500) -> None:
    """Measure many schemas with a few migrations each, and print the table."""

    async def measure() -> list[str]:
        async with server(url) as measured:
            return await migrate_tenants(measured, schemas)

    print(f"{schemas} schemas of {MIGRATIONS} migrations\n", *anyio.run(measure), sep="\n")


@app.command
def report() -> None:
    """Print the tables of the last run as Markdown."""
    print(peers_report(load("peers", PeersRecord)))
    print(stall_report(load("stall", StallRecord)))


if __name__ == "__main__":
    app()
