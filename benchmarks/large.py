"""`python -m benchmarks.large`: what large files cost in memory, in silence and in pauses of the event loop.

Each is migrated by a process of its own, in which another task ticks every few milliseconds. A pause is the processor
time that passes between two ticks, so that whatever else the machine does counts for nothing.
"""

import asyncio
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time

import anyio
import msgspec

import ampd
from ampd.database_url import DatabaseUrl
from benchmarks.server import server

DATABASE = "bench_large"
TICK_SECONDS = 0.005


class Load(msgspec.Struct, frozen=True):
    """What one run has cost its process; memory in bytes, times in seconds."""

    peak_memory: int
    first_event: float  # from the beginning
    longest_pause: float
    seconds: float
    error: str | None


def inserts(count: int, *, width: int = 10) -> str:
    """Return a script of so many INSERTs, each with a text of that width."""
    return "CREATE TABLE big (a int, b text);\n" + "".join(
        f"INSERT INTO big (a, b) VALUES ({number}, 'row number {number} {'x' * width}');\n" for number in range(count)
    )


def scripts() -> Iterator[tuple[str, str]]:
    """Yield the scripts that are measured, each with what it is."""
    yield "14 MB, 170,000 statements", inserts(170_000)
    yield "40 MB, 500,000 statements", inserts(500_000)
    yield "14 MB, 20,000 statements", inserts(20_000, width=640)
    yield "14 MB, one literal", "SELECT length('" + "ab ''c\n" * 2_000_000 + "')"
    yield "2 MB, 20,000 statements, no transaction", "-- no-transaction\n" + inserts(20_000, width=40)


def measure(url: str, folder: Path) -> Load:
    """Migrate a database to a folder in a process of its own and return what that has cost."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.large", url, str(folder)], capture_output=True, check=True
    )
    return msgspec.json.decode(child.stdout, type=Load)


async def _load(url: str, folder: Path) -> Load:
    longest, first_event, begun = 0.0, 0.0, perf_counter()

    async def tick() -> None:
        nonlocal longest
        while True:
            before = thread_time()
            await asyncio.sleep(TICK_SECONDS)
            longest = max(longest, thread_time() - before)

    def heard(_: ampd.Event) -> None:
        nonlocal first_event
        first_event = first_event or perf_counter() - begun

    for module in ("apply.no_transaction", "history.first_run"):
        import_module(f"ampd.{module}")  # which any file costs, and once
    await ampd.status(url, migrations=())
    ticking, error = asyncio.create_task(tick()), None
    await asyncio.sleep(0)
    begun = perf_counter()
    try:
        await ampd.migrate(
            ampd.MetadataDb(url=DatabaseUrl(url), migrations=ampd.Migrations(dir=folder)), on_event=heard
        )
    except ampd.AmpdError as failed:
        error = failed.message
    seconds = perf_counter() - begun
    ticking.cancel()
    return Load(_peak_memory(), first_event, longest, seconds, error)


def _peak_memory() -> int:
    """Return the most memory that this process has taken; Linux's ru_maxrss begins with that of the parent."""
    with suppress(OSError):
        return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


async def _compare(url: str | None) -> None:
    print("| file | peak memory | of the file | first event | longest pause | statements/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    async with server(url) as measured:
        for name, script in scripts():
            await measured.create_anew(DATABASE)
            with TemporaryDirectory() as scratch:
                (Path(scratch) / "1_big.sql").write_text(script)
                load = await anyio.to_thread.run_sync(measure, measured.url_of(DATABASE), Path(scratch))
            rate = script.count(";\n") / load.seconds
            print(
                f"| {name} | {load.peak_memory / 1e6:.0f} MB | {load.peak_memory / len(script):.1f} x "
                f"| {load.first_event:.2f} s | {load.longest_pause * 1000:.0f} ms | {rate:,.0f} | {load.error or ''}"
            )


if __name__ == "__main__":
    match sys.argv[1:]:
        case [url, folder]:
            sys.stdout.buffer.write(msgspec.json.encode(anyio.run(_load, url, Path(folder))))
        case _:
            anyio.run(_compare, sys.argv[1] if sys.argv[1:] else None)
