"""As whom the server runs: an ordinary user, in folders that are nobody else's, with no environment of the caller's."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import anyio
import msgspec

from ampd.errors import ConfigError, ConnectionFailed

from .installation import LOADER_VARIABLES, Installation

POLL_SECS = 0.01


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the folder.

    Raises:
        ConfigError: it, or something in it or beside it, is not what it should be.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        what = error.strerror if isinstance(error, OSError) else error
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        raise ConfigError(
            f"cannot keep a database in {folder}{where}: {what}", hint="choose another folder with --amp-dir"
        ) from error


def beside(data_dir: Path, suffix: str) -> Path:
    """Return the path of what lies beside a data folder."""
    return data_dir.with_name(f"{data_dir.name}.{suffix}")


def startup_error(message: str, log: Path) -> ConnectionFailed:
    """Return the error for a program that failed, with the last words of its log."""
    last_words = log.read_text(errors="replace").splitlines()[-12:]
    return ConnectionFailed(message, detail="\n".join(last_words), hint=f"the whole log is in {log}")


def check_folder(folder: Path) -> None:
    """Refuse a folder in which somebody else could put links or files in place of ours.

    Raises:
        ConfigError: it belongs to another user, or others may write to it.
    """
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()):
        owner = _user(status.st_uid)
        raise ConfigError(
            f"cannot keep a database in {folder}: it belongs to {owner}", hint="choose another folder with --amp-dir"
        )
    if status.st_mode & 0o002:
        raise ConfigError(f"cannot keep a database in {folder}: everybody may write to it", hint=f"chmod o-w {folder}")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def open_without_links(path: str, flags: int) -> int:
    """Open a file for `open`, unless it is a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


class Launcher(msgspec.Struct, frozen=True):
    """How PostgreSQL's programs are started: as which account, and through which other program."""

    account: tuple[int, int] | None
    prefix: list[str]
    switch: dict[str, Any]

    @classmethod
    def choose(cls, data_dir: Path) -> Launcher:
        """Return as whom to run the server of a data folder."""
        setpriv = shutil.which("setpriv")
        if setpriv and Path(setpriv).resolve().name != "setpriv":  # busybox's knows nothing of what follows
            setpriv = None
        prefix = [setpriv, "--pdeathsig", "INT"] if setpriv else []  # a killed parent takes the server along
        if os.geteuid() != 0:
            return cls(None, prefix, {})
        uid, gid = unprivileged_account(data_dir)
        if (closed := closed_folder(data_dir.parent, uid)) is not None:
            user = _user(uid)
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

    def give(self, path: Path) -> None:
        """Hand a folder to the account."""
        if self.account:
            os.chown(path, *self.account)

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
        """Run a program to its end, which must be a good one."""
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


def closed_folder(folder: Path, uid: int) -> Path | None:
    """Return the outermost folder on the way to one that a user of no group may not enter; None if there is none."""
    way = (*reversed(folder.parents), folder)
    statuses = ((path, path.stat()) for path in way)
    return next((path for path, at in statuses if not at.st_mode & (0o100 if at.st_uid == uid else 0o001)), None)


def is_running(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a child has not ended."""
    return process.poll() is None


async def wait_while(condition: Callable[[], bool], *, interval: float = POLL_SECS) -> None:
    """Wait until a condition no longer holds."""
    while condition():  # noqa: ASYNC110 - the end of somebody else's child raises no event
        await anyio.sleep(interval)
