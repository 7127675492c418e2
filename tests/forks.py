"""Processes of `ampd` without the price of a start: each is forked off an interpreter that has everything imported.

They are processes in every other way: they have an id, signals, an exit code, pipes, a folder and an environment.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_IMPORTED = (
    "anyio._backends._asyncio asyncio asyncpg cyclopts msgspec tomllib ampd.cli.commands ampd.__main__ ampd.migrator "
    "ampd.pool ampd.lint ampd.cli.progress ampd.cli.live ampd.cli.baseline ampd.cli.lint ampd.cli.new ampd.cli.solo "
    "ampd.apply.no_transaction ampd.apply.diagnosis ampd.config_sources difflib rich.console rich.markdown rich.panel "
    "rich._emoji_codes cyclopts.help cyclopts.completion cyclopts.config docstring_parser"
)


class Fork(subprocess.Popen[str]):
    """A process that is no child of ours, but of the interpreter that it was forked off, which tells how it ends."""

    def __init__(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        (out, stdout), (err, stderr), (self._told, telling) = os.pipe(), os.pipe(), os.pipe()
        request = json.dumps([list(arguments), str(cwd), dict(env)]).encode()
        server, _ = _server()
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [stdout, stderr, telling])
        server.sendall(request)
        for end in (stdout, stderr, telling):
            os.close(end)
        self.pid = int.from_bytes(os.read(self._told, 4), "big")
        self.args = ["ampd", *arguments]
        self.stdin, self.stdout, self.stderr = None, os.fdopen(out), os.fdopen(err)
        self.returncode: int | None = None
        self.text_mode = True
        self._child_created = True
        self._communication_started = False
        self._input = None
        self._waitpid_lock = threading.Lock()

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._told], [], [], 0)[0]:
            return 0, 0
        status = os.read(self._told, 4)
        os.close(self._told)
        return self.pid, int.from_bytes(status, "big")

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start the interpreter that is forked; it ends with the one that has started it."""
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=root
    )
    theirs.close()
    atexit.register(_end, ours, process)
    return ours, process


def _end(server: socket.socket, process: subprocess.Popen[bytes]) -> None:
    server.close()
    process.wait()


def serve(requests: socket.socket) -> None:
    """Fork for each request, until there can be no more."""
    for module in _IMPORTED.split():
        __import__(module)
    gc.freeze()  # a search for garbage would write to each of their pages, which are shared until then
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        head, descriptors, _, _ = socket.recv_fds(requests, 4, 3)
        if not head:
            return
        body = requests.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        if os.fork() == 0:
            _watch(requests, *json.loads(body), *descriptors)
        for end in descriptors:
            os.close(end)


def _watch(
    requests: socket.socket, arguments: list[str], cwd: str, env: dict[str, str], stdout: int, stderr: int, telling: int
) -> None:
    """Run the command in a child, and tell its process id and then how it ends, while others are served."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    pid = os.fork()
    if pid == 0:
        os.close(telling)
        _run(arguments, cwd, env, stdout, stderr)
    for end in (stdout, stderr):
        os.close(end)
    os.write(telling, pid.to_bytes(4, "big"))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(telling, status.to_bytes(4, "big"))
    os._exit(0)


def _run(arguments: list[str], cwd: str, env: dict[str, str], stdout: int, stderr: int) -> None:
    import random
    import traceback

    code: object = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for descriptor, end in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
            os.dup2(descriptor, end)
            os.close(descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
        sys.argv = ["ampd", *arguments]
        random.seed()
        from ampd.__main__ import main

        main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
