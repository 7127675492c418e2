"""The services of `examples/` as processes: each server with its application, and how to know that it serves."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from urllib.request import urlopen

import msgspec

from tests.servers import free_port

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE_SECS = 180  # after which what still runs is killed, and the test fails


class Recipe(msgspec.Struct, frozen=True):
    """How to start a server: its arguments, and what it says of each worker that has begun to serve."""

    module: str
    arguments: tuple[str, ...]
    application: str
    workers: int
    says: str = "Application startup complete."

    def command(self, port: int) -> list[str]:
        """Return the command line for a port."""
        bind = f"--bind=127.0.0.1:{port}" if self.module != "uvicorn" else f"--port={port}"
        return [sys.executable, "-m", self.module, *self.arguments, bind, self.application]


UVICORN = Recipe("uvicorn", ("--workers=3",), "starlette_app:app", 3)
GUNICORN = Recipe("gunicorn", ("--config=gunicorn.conf.py", "--no-control-socket"), "fastapi_app:app", 4)
HYPERCORN = Recipe("hypercorn", ("--workers=2",), "litestar_app:app", 2, "Running on http")
RECIPES = {"uvicorn": UVICORN, "gunicorn": GUNICORN, "hypercorn": HYPERCORN}


def environment(url: str, **more: str) -> dict[str, str]:
    """Return the environment of an example, without the settings of whoever runs the tests."""
    own = ("PG", "AMP_", "UVICORN", "GUNICORN", "WEB_CONCURRENCY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "AMP_CONFIG_METADATA_DB__URL": url, "DATABASE_URL": url, **more}


def with_ampd(folder: Path) -> str:
    """Return a PATH on which `ampd` is that of this checkout; its folder is made here."""
    folder.mkdir()
    (folder / "ampd").write_text(f'#!/bin/sh\nexec {sys.executable} -m ampd "$@"\n')
    (folder / "ampd").chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


class Service:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.log = ""
        self._port = port

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until the log contains something so many times, or ends."""
        self._read_log(lambda log: log.count(text) >= times)

    def _read_log(self, until: Callable[[str], bool]) -> None:
        assert self.process.stderr is not None
        while not until(self.log) and (line := self.process.stderr.readline()):
            self.log += line

    def get(self, path: str) -> str:
        """Ask a worker, any."""
        with urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=PATIENCE_SECS) as answer:
            told: bytes = answer.read()
            return told.decode()

    def exit_code(self) -> int:
        """Return what it has ended with by itself."""
        self._read_log(lambda _: False)
        return self.process.wait()


@contextmanager
def service(recipe: Recipe, url: str, *, auto_migrate: bool = True, folder: Path = EXAMPLES) -> Iterator[Service]:
    """Start a server in a folder, and stop it in the end."""
    port = free_port()
    settings = {
        "AMP_CONFIG_METADATA_DB__AUTO_MIGRATE": str(auto_migrate),
        "AMP_CONFIG_METADATA_DB__POOL_SIZE": "2",
        "PYTHONPATH": str(folder),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        recipe.command(port),
        cwd=folder,
        env=environment(url, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that no worker is left behind
    )
    watchdog = Timer(PATIENCE_SECS, _kill, [process])
    watchdog.start()
    try:
        yield Service(process, port)
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE_SECS)
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
