"""Starlette: the lifespan opens the pool, and so brings the schema up to date.

uvicorn --workers 8 starlette_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

import asyncpg
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import ampd


class State(TypedDict):
    """What each request finds in `request.state`."""

    pool: asyncpg.Pool


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[State]:
    """Hold a pool for as long as this worker lives, on a schema that is up to date."""
    config = ampd.load_config()
    async with ampd.open_pool(config.metadata_db, migrations=ampd.read_migrations(package="shop")) as pool:
        yield {"pool": pool}


async def visit(request: Request) -> JSONResponse:
    """Note which worker was asked."""
    worker = await request.state.pool.fetchval(
        "INSERT INTO visits (worker) VALUES ($1) RETURNING worker", f"worker {os.getpid()}"
    )
    return JSONResponse({"worker": worker})


app = Starlette(lifespan=lifespan, routes=[Route("/visit", visit)])
