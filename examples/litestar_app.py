"""Litestar: the lifespan opens the pool, and so brings the schema up to date.

hypercorn --workers 4 litestar_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from litestar import Litestar, get
from litestar.datastructures import State

import ampd


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    """Hold a pool for as long as this worker lives, on a schema that is up to date."""
    config = ampd.load_config()
    async with ampd.open_pool(config.metadata_db, migrations=ampd.read_migrations(package="shop")) as pool:
        app.state.pool = pool
        yield


@get("/visit")
async def visit(state: State) -> dict[str, str]:
    """Note which worker was asked."""
    pool: asyncpg.Pool = state.pool
    query = "INSERT INTO visits (worker) VALUES ($1) RETURNING worker"
    return {"worker": await pool.fetchval(query, f"worker {os.getpid()}")}


app = Litestar(lifespan=[lifespan], route_handlers=[visit])
