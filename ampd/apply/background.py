"""A task in the background of a block of code: a heartbeat, a look at who blocks whom, composing the next message."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


@asynccontextmanager
async def in_background(task: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run a task for the time of a block; what either raises ends both, and goes through as it is."""
    raised: Exception | None = None

    async def run() -> None:
        nonlocal raised
        try:
            await task()
        except Exception as error:  # a task group would wrap it
            raised = raised or error
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            yield
        except Exception as error:
            raised = raised or error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised
