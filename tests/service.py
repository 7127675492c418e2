"""A small ASGI service that embeds ampd: its lifespan opens the pool, and so brings the schema up to date."""

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

NODE = f"node-{os.getpid()}"


class State(TypedDict):
    """What each request finds in `request.state`."""

    pool: asyncpg.Pool


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[State]:
    """Hold the pool for as long as this worker lives, and register the worker."""
    config = ampd.load_config()
    async with ampd.open_pool(config.metadata_db) as pool:
        await pool.execute("INSERT INTO workers (node_id, heartbeat_at) VALUES ($1, now())", NODE)
        yield {"pool": pool}


async def health(request: Request) -> JSONResponse:
    """Say which worker this is, by what the database knows of it, and how many migrations it finds applied."""
    query = "SELECT node_id, (SELECT count(finished_at) FROM ampd_schema_migrations) FROM workers WHERE node_id = $1"
    node, applied = await request.state.pool.fetchrow(query, NODE)
    return JSONResponse({"node": node, "applied": applied})


app = Starlette(lifespan=lifespan, routes=[Route("/health", health)])
