"""The least that any program on ampd's packages can do: import them, connect, select 1, exit."""

import sys

import anyio
import asyncpg
import cyclopts  # noqa: F401
import msgspec  # noqa: F401


async def main() -> None:
    connection = await asyncpg.connect(sys.argv[1])
    await connection.execute("SELECT 1")
    await connection.close()


anyio.run(main)
