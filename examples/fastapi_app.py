"""FastAPI: the same lifespan, the pool as a dependency, and a readiness probe.

uvicorn --reload fastapi_app:app
gunicorn --config gunicorn.conf.py fastapi_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, TypedDict

import asyncpg
from fastapi import Depends, FastAPI, Request, Response

import ampd


class State(TypedDict):
    """What each request finds in `request.state`."""

    pool: asyncpg.Pool


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[State]:
    """Hold a pool for as long as this worker lives, on a schema that is up to date."""
    config = ampd.load_config()
    migrations = ampd.read_migrations(package="shop")
    async with ampd.open_pool(config.metadata_db, migrations=migrations, on_event=ampd.log_events()) as pool:
        yield {"pool": pool}


async def _pool(request: Request) -> asyncpg.Pool:
    return request.state.pool


Pool = Annotated[asyncpg.Pool, Depends(_pool)]
app = FastAPI(lifespan=lifespan)


@app.get("/visit")
async def visit(pool: Pool) -> dict[str, str]:
    """Note which worker was asked."""
    query = "INSERT INTO visits (worker) VALUES ($1) RETURNING worker"
    return {"worker": await pool.fetchval(query, f"worker {os.getpid()}")}


@app.get("/ready")
async def ready(pool: Pool, response: Response) -> dict[str, bool]:
    """Say whether the schema is the one that this build needs, or a newer one."""
    status = await ampd.status(pool, migrations=ampd.read_migrations(package="shop"))
    response.status_code = 200 if status.ready else 503
    return {"ready": status.ready}
