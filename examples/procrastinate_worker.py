"""Procrastinate in the application's own database: the queue's schema is a migration like any other.

procrastinate schema --read > shop/migrations/3_procrastinate.sql    # once, and committed
python procrastinate_worker.py
"""

import asyncio
import os

from procrastinate import App, PsycopgConnector

import ampd

app = App(connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"]))


@app.task
async def greet(worker: str) -> None:
    """Note the visit of a worker, in a job."""
    sql = "INSERT INTO visits (worker) VALUES (%(worker)s)"
    await app.connector.execute_query_async(sql, worker=worker)


async def main() -> None:
    """Migrate, leave a job in the queue, and work until the queue is empty."""
    await ampd.migrate(os.environ["DATABASE_URL"], migrations=ampd.read_migrations(package="shop"))
    async with app.open_async():
        await greet.defer_async(worker="procrastinate")
        await app.run_worker_async(wait=False, install_signal_handlers=False)


if __name__ == "__main__":
    asyncio.run(main())
