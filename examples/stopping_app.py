"""SIGTERM while a migration runs: without this, every server waits until the lifespan has begun to serve.

uvicorn stopping_app:app
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

from starlette.applications import Starlette

import ampd


@contextmanager
def cancelled_by_sigterm() -> Iterator[None]:
    """Cancel this task on SIGTERM, for the length of the block; the server hears of the signal as well."""
    loop, task, before = asyncio.get_running_loop(), asyncio.current_task(), signal.getsignal(signal.SIGTERM)
    assert task is not None

    def stop(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(task.cancel)
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Migrate, and roll the running migration back when the pod is to go."""
    config = ampd.load_config()
    with cancelled_by_sigterm():
        await ampd.migrate(config.metadata_db, migrations=ampd.read_migrations(package="shop"))
    yield


app = Starlette(lifespan=lifespan)
