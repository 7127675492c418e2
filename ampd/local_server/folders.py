"""Folders that no other user can write to: the owner and the permissions of each one on the path."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ampd.errors import ConfigError

_MOST_LINKS = 40  # on one path, as in the kernel
ELSEWHERE = "choose another folder with --amp-dir"


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Raise errors of the file system as one that names the folder.

    Raises:
        ConfigError: it, or something in it or beside it, is not what it should be.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        what = error.strerror if isinstance(error, OSError) else error
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        raise ConfigError(f"cannot keep a database in {folder}{where}: {what}", hint=ELSEWHERE) from error


def beside(data_dir: Path, suffix: str) -> Path:
    """Return the path of a neighbour of a data folder."""
    return data_dir.with_name(f"{data_dir.name}.{suffix}")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that nobody else may write to them, whatever the umask.

    Raises:
        ConfigError: somebody else could put links or files in place of ours.
    """
    check_path(folder, "keep a database in")
    mode = 0o711 if os.geteuid() == 0 else 0o700  # root's server runs as another user, who has to pass
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            try:
                each.mkdir(mode)
            except FileExistsError:
                if not each.is_dir():
                    raise
            else:
                _set_mode(each, mode)
    check_path(folder, "keep a database in", must_exist=True)


def make_amps_folders(amp_dir: Path) -> None:
    """Make the folders that amp's programs expect beside the database, unless they are there; links may be, too.

    Raises:
        ConfigError: one cannot be made.
    """
    for name in ("data", "providers", "manifests"):
        folder = amp_dir / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}", hint=ELSEWHERE) from error


def _set_mode(folder: Path, mode: int) -> None:
    """Set the mode of a folder that was just made, whatever the umask; not that of what has taken its place since."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def check_path(path: Path, use: str, *, must_exist: bool = False) -> None:
    """Refuse a path if another user could replace something on it; unless it must exist, its end need not.

    Every folder and link on the way, and what is at the end, belongs to us or to root. No other user may write to what
    is at the end, nor to a folder on the way, unless its sticky bit keeps what it contains from being replaced.

    Raises:
        ConfigError: names what is not so, and its owner.
        FileNotFoundError: it must exist, and does not: whatever comes there after this check was not checked.
    """
    for at, status, is_end in _way(path, must_exist=must_exist):
        what = f"cannot {use} {path}: {'it' if at == path.absolute() else at}"
        if status.st_uid not in (0, os.geteuid()):
            hint = ELSEWHERE if stat.S_ISDIR(status.st_mode) else f"remove it, or {ELSEWHERE}"
            raise ConfigError(f"{what} belongs to {user_name(status.st_uid)}", hint=hint)
        sticky = status.st_mode & stat.S_ISVTX
        if (
            not stat.S_ISLNK(status.st_mode)
            and (is_end or not sticky)
            and (writers := _other_writers(at, status, strict=is_end))
        ):
            hint = ELSEWHERE if sticky else f"chmod go-w {at}, or {ELSEWHERE}"
            raise ConfigError(f"{what} can be written to by {writers}", hint=hint)


def _way(path: Path, *, must_exist: bool) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Yield each folder and link on the way to a path, outermost first, as far as they exist; and which is its end."""
    at, left, links = Path("/"), [*reversed(path.absolute().parts[1:])], 0
    yield at, at.lstat(), not left
    while left:
        part = left.pop()
        if part == "..":
            at = at.parent
            continue
        try:
            status = (at / part).lstat()
        except (FileNotFoundError, NotADirectoryError):
            if must_exist:
                raise
            return
        if not stat.S_ISLNK(status.st_mode):
            at /= part
            yield at, status, not left
            continue
        yield at / part, status, False
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(at / part))
        at = Path("/") if target.is_absolute() else at
        left += [each for each in reversed(target.parts) if each != "/"]


def _other_writers(path: Path, status: os.stat_result, *, strict: bool) -> str | None:
    """Return who besides the owner may write; unless `strict`, a group of the owner's alone is nobody else."""
    if status.st_mode & stat.S_IWOTH:
        return "everybody"
    if status.st_mode & stat.S_IWGRP and (strict or _has_acl(path) or not _is_private(status.st_uid, status.st_gid)):
        return f"the group {group_name(status.st_gid)}"
    return None


def _has_acl(path: Path) -> bool:
    """Return whether an access control list grants more than the mode shows, in which the group's bits are a mask."""
    try:
        return "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False)
    except (AttributeError, OSError):  # another operating system, or a file system without any
        return False


def _is_private(uid: int, gid: int) -> bool:
    """Return whether a group is one that was made for a single user, as many systems do, and has no other member."""
    with suppress(KeyError):
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
        own = user.pw_gid == gid and group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name}
        return own and all(each.pw_name == user.pw_name for each in pwd.getpwall() if each.pw_gid == gid)
    return False


def user_name(uid: int) -> str:
    """Return the name of a user, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def group_name(gid: int) -> str:
    """Return the name of a group, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"id {gid}"


def closed_folder(folder: Path, uid: int) -> Path | None:
    """Return the outermost folder on a path that a user of no group may not enter; None if there is none."""
    way = (*reversed(folder.parents), folder)
    statuses = ((path, path.stat()) for path in way)
    return next((path for path, at in statuses if not at.st_mode & (0o100 if at.st_uid == uid else 0o001)), None)


def open_without_links(path: str, flags: int) -> int:
    """Open a file for `open`, unless it is a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def give_folder(folder: Path, account: tuple[int, int]) -> None:
    """Make a user and group the owner of a folder, unless it is a link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchown(descriptor, *account)
    finally:
        os.close(descriptor)
