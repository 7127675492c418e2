"""How the server is started: as an ordinary user, with no environment of the caller's."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import anyio
import msgspec

from ampd.errors import ConfigError, ConnectionFailed

from .folders import closed_folder, give_folder, open_without_links, user_name
from .installation import LOADER_VARIABLES, Installation

POLL_SECS = 0.01


def startup_error(message: str, log: Path) -> ConnectionFailed:
    """Return the error for a program that failed, with the last words of its log."""
    last_words = log.read_text(errors="replace").splitlines()[-12:]
    return ConnectionFailed(message, detail="\n".join(last_words), hint=f"the whole log is in {log}")


class Launcher(msgspec.Struct, frozen=True):
    """How PostgreSQL's programs are started: as which account, and through which other program."""

    account: tuple[int, int] | None
    prefix: list[str]
    switch: dict[str, Any]

    @classmethod
    def choose(cls, data_dir: Path) -> Launcher:
        """Return how to run the server of a data folder."""
        setpriv = shutil.which("setpriv")
        if setpriv and Path(setpriv).resolve().name != "setpriv":  # busybox's knows nothing of what follows
            setpriv = None
        prefix = [setpriv, "--pdeathsig", "INT"] if setpriv else []  # a killed parent takes the server along
        if os.geteuid() != 0:
            return cls(None, prefix, {})
        uid, gid = unprivileged_account(data_dir)
        if (closed := closed_folder(data_dir.parent, uid)) is not None:
            user = user_name(uid)
            raise ConfigError(
                f"cannot keep a database in {data_dir}: root runs PostgreSQL as {user}, who may not enter {closed}",
                hint=f"choose with --amp-dir a folder that {user} can reach, such as /var/lib/amp; "
                "or run ampd as another user",
            )
        return cls((uid, gid), prefix, {"user": uid, "group": gid, "extra_groups": []})

    def reach(self, installation: Installation, stack: AsyncExitStack) -> Installation:
        """Return the installation, or for as long as the stack lives a copy of it that the account may enter."""
        if self.account is None or closed_folder(installation.bindir, self.account[0]) is None:
            return installation
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ampd-postgres-")))
        folder.chmod(0o755)
        for part in ("lib", "share", installation.bindir.name):
            if (original := installation.bindir.parent / part).is_dir():
                shutil.copytree(original, folder / part, symlinks=True)
        return Installation(folder / installation.bindir.name, installation.major)

    def give(self, folder: Path) -> None:
        """Make the account the owner of a folder."""
        if self.account:
            give_folder(folder, self.account)

    def start(
        self, program: Path, *arguments: str | Path, log: Path, stdin: IO[bytes] | int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own, beyond the terminal's Ctrl+C, and without our environment."""
        environment = {name: os.environ[name] for name in LOADER_VARIABLES if name in os.environ}
        with open(log, "wb", opener=open_without_links) as output:
            return subprocess.Popen(
                [*self.prefix, program, *arguments],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment | {"LC_ALL": "C", "PATH": os.defpath},
                start_new_session=True,
                **self.switch,
            )

    async def run(self, program: Path, *arguments: str | Path, log: Path, stdin: bytes = b"") -> None:
        """Run a program to its end; if it fails, raise ConnectionFailed with the end of its log."""
        with tempfile.TemporaryFile() as script:
            script.write(stdin)
            script.seek(0)
            process = self.start(program, *arguments, log=log, stdin=script)
        try:
            await wait_while(partial(is_running, process))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # initdb has children of its own
            process.wait()
            raise
        if process.returncode:
            raise startup_error(f"{program.name} failed", log)


def unprivileged_account(data_dir: Path) -> tuple[int, int]:
    """Return the user and group that root runs the server as."""
    if data_dir.exists() and (owner := data_dir.stat()).st_uid != 0:
        return owner.st_uid, owner.st_gid
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            account = pwd.getpwnam(name)
            return account.pw_uid, account.pw_gid
    raise ConfigError("PostgreSQL does not run as root, and there is no user postgres or nobody", hint="create one")


def is_running(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a child has not ended."""
    return process.poll() is None


async def wait_while(condition: Callable[[], bool], *, interval: float = POLL_SECS) -> None:
    """Wait until a condition no longer holds."""
    while condition():  # noqa: ASYNC110 - the end of somebody else's child raises no event
        await anyio.sleep(interval)
