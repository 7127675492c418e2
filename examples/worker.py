"""A bare asyncio worker: it migrates, works until SIGTERM or Ctrl+C, and gives its pool back.

python worker.py
"""

import asyncio
import signal

import ampd


async def main() -> None:
    """Work until the task is cancelled."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    config = ampd.load_config()
    async with ampd.open_pool(config.metadata_db, migrations=ampd.read_migrations(package="shop")) as pool:
        while True:
            await pool.execute("INSERT INTO visits (worker) VALUES ('a worker')")
            await asyncio.sleep(1)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        raise SystemExit(143) from None  # 128 + SIGTERM, as a shell would report it
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT
