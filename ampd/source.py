"""Where migrations come from: a folder, or the files packaged with ampd; read once, before anything connects."""

from __future__ import annotations

import os
from codecs import utf_8_decode
from errno import ENOENT, ENOTDIR
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, TypeAlias

from .errors import InvalidMigration
from .migration import BOM, LONGEST_VERSION, PACKAGED, Migration, parse_file_name, with_line_feeds
from .sql.slices import Slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.resources.abc import Traversable


_LARGEST = 512 * 2**20  # bytes of a file

Entry: TypeAlias = "os.DirEntry[str] | Traversable"  # of a folder, or of a packaged one that is in an archive


def reading(directory: str | Path | None = None) -> Slices[tuple[Migration, ...]]:
    """Read the migrations of a folder, or the packaged ones, in slices; the work of `read_migrations`."""
    if directory is None:
        return (yield from reading_from(_packaged(), PACKAGED, _INSTALL_AGAIN))
    if not str(directory):  # from a variable that is not set, say: it would be the working folder
        raise InvalidMigration("the migrations folder is an empty path", hint="write . for the working folder")
    return (yield from reading_from(Path(directory), str(Path(directory)), _ANOTHER_PATH))


_INSTALL_AGAIN = "install ampd again, with its .sql files, or give a folder of your own with --migrations DIR"
_ANOTHER_PATH = (
    "give it with --migrations DIR or metadata_db.migrations.dir; "
    "a relative path in the configuration file is relative to that file"
)


def _packaged() -> Path | Traversable:
    """Return the packaged folder; from a plain installation without importlib.resources, which costs 6 ms to import."""
    plain = Path(__file__).with_name("migrations")
    if plain.is_dir():
        return plain
    from importlib.resources import files

    return files("ampd") / "migrations"


def reading_from(folder: Path | Traversable, shown: str, hint: str) -> Slices[tuple[Migration, ...]]:
    """Read the migrations of a folder that errors call `shown`; the `hint` is for one that is not there, or empty."""
    migrations: list[Migration] = []
    taken: dict[int, str] = {}
    problems: list[tuple[str, str]] = []
    for entry in (yield from _files(folder, shown, hint)):
        name = entry.name
        file_name = name if name.isascii() else os.fsencode(name).decode(errors="backslashreplace")
        parsed = parse_file_name(file_name)
        if parsed is None:
            problems.append((file_name, _name_problem(file_name)))
            continue
        version, title = parsed
        if file_name is not name and file_name.encode() != os.fsencode(name):
            problems.append((file_name, "has a name that is not UTF-8"))
        if (twin := taken.setdefault(version, file_name)) != file_name:
            problems.append((file_name, f"has version {version}, and so has {twin}"))
        if not file_name.isprintable():  # a line break in it would be one in a dry run's script
            shown_name = file_name.encode("unicode_escape").decode()
            problems.append((shown_name, "has a character in its name that cannot be printed"))
        try:
            sql, checksum = yield from _content(entry)
        except OSError as error:
            problems.append((file_name, f"cannot be read: {error.strerror or error}"))
            continue
        except _Unusable as error:
            problems.append((file_name, str(error)))
            continue
        migrations.append(Migration(version, title, f"{shown}/{file_name}", sql, checksum))
    if problems:
        raise _unusable_error(problems, shown)
    yield
    return tuple(sorted(migrations, key=attrgetter("version")))


def _name_problem(file_name: str) -> str:
    """Return why a name is no migration's."""
    if not file_name.endswith(".sql"):
        return "does not end in .sql, in small letters"
    digits, underscore, _ = file_name.partition("_")
    if underscore and len(digits) > LONGEST_VERSION and digits.isascii() and digits.isdecimal():
        return f"has a version of {len(digits)} digits"
    return "is not named <version>_<name>.sql"


class _Unusable(Exception):
    """A file that is no migration's, and why: what it is, or that it is not UTF-8 text or contains a NUL byte."""


_PIECE = 1 << 16  # bytes; memory for more at once is fetched from the system, and given back, for each file anew


def _content(entry: Entry) -> Slices[tuple[str, bytes]]:
    """Return a file's text and checksum; it is read in pieces, so that no second copy of it is made.

    Raises:
        OSError: it cannot be read.
        _Unusable: it must not be read, is not UTF-8, or contains a NUL byte.
    """
    digest = sha256()
    texts: list[str] = []
    has_nul = False
    read, close = _opened(entry)
    try:
        piece = read(_PIECE).removeprefix(BOM)
        while piece:
            more = read(_PIECE)
            if more and not texts:
                _check_size(entry)
            whole = piece.removesuffix(b"\r") if more else piece  # what follows may make a CRLF of it
            try:
                text, size = utf_8_decode(whole, "strict", not more)  # up to the last character that is not cut
            except UnicodeDecodeError as error:
                line = sum(text.count("\n") for text in texts) + whole.count(b"\n", 0, error.start) + 1
                raise _Unusable(f"is not UTF-8 text (line {line})") from None
            digest.update(with_line_feeds(whole[:size]))
            texts.append(text)
            has_nul = has_nul or "\0" in text
            piece = piece[size:] + more
            yield
    finally:
        close()
    sql = "".join(texts)
    if has_nul:
        line = sql.count("\n", 0, sql.index("\0")) + 1
        raise _Unusable(f"holds a NUL byte in line {line}")
    return sql, digest.digest()


def _files(folder: Path | Traversable, shown: str, hint: str) -> Slices[list[Entry]]:
    files: list[Entry] = []
    others: list[str] = []
    try:
        for entry in _entries(folder):
            if _should_be_migration(entry):
                files.append(entry)
            else:
                others.append(f"{entry.name}{'/' if _is_folder(entry) else ''}")
            yield
    except OSError as error:
        what = {ENOENT: "does not exist", ENOTDIR: "is not a folder"}.get(error.errno or 0)
        raise InvalidMigration(
            f"the migrations folder {shown} {what or f'cannot be read: {error.strerror or error}'}",
            file=shown,
            hint=hint,
        ) from error
    if not files:
        others.sort()
        some = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        passed_over = f"passed over: {os.fsencode(some).decode(errors='backslashreplace')}" if some else "it is empty"
        raise InvalidMigration(
            f"the migrations folder {shown} contains no file <version>_<name>.sql ({passed_over})",
            file=shown,
            hint=f"{hint}; subfolders are not read" if any(name.endswith("/") for name in others) else hint,
        )
    return sorted(files, key=attrgetter("name"))


def _entries(folder: Path | Traversable) -> Iterator[Entry]:
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:  # which knows the type of each, where iterdir() would ask once more
            yield from entries
        return
    if not folder.is_dir():  # to list it would be a ValueError
        raise FileNotFoundError(ENOENT, "no such folder in the archive")
    yield from folder.iterdir()


def _should_be_migration(entry: Entry) -> bool:
    name = entry.name.lower()  # in capitals it is no less meant to be one
    passed_over = name.startswith(".") or name.endswith(".down.sql") or not name.endswith(".sql")
    return not passed_over and not _is_folder(entry)


def _is_folder(entry: Entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _opened(entry: Entry) -> tuple[Callable[[int], bytes], Callable[[], None]]:
    """Return the functions that read up to so many bytes of a file, and close it; it takes few system calls.

    Raises:
        OSError: it cannot be opened.
        _Unusable: it must not be. A line of a file is shown where it fails, to people who may not be able to read it.
    """
    if not isinstance(entry, os.DirEntry):
        packaged = entry.open("rb")
        return packaged.read, packaged.close
    if not entry.is_file(follow_symlinks=False):  # the list of the folder has told
        if not S_ISREG(entry.stat().st_mode):  # reading a pipe would wait for ever
            raise _Unusable("is not a regular file")
        if not (path := Path(entry.path)).resolve().is_relative_to(path.parent.resolve()):
            raise _Unusable("is a link that leads out of the folder")
    file = os.open(entry.path, os.O_RDONLY)
    return lambda size: os.read(file, size), lambda: os.close(file)


def _check_size(entry: Entry) -> None:
    if isinstance(entry, os.DirEntry) and entry.stat().st_size > _LARGEST:
        raise _Unusable(f"is larger than {_LARGEST // 2**20} MiB")


def _unusable_error(problems: list[tuple[str, str]], shown: str) -> InvalidMigration:
    first_name, first_problem = problems[0]
    if len(problems) == 1:
        message = f"{shown}/{first_name} {first_problem}"
    else:
        listed = "".join(f"\n  {name} {what}" for name, what in problems)
        message = f"{len(problems)} faults in the files of {shown}:{listed}"
    return InvalidMigration(
        message,
        file=f"{shown}/{first_name}",
        hint="a migration file is named <version>_<name>.sql, with a version of 1 to 18 digits that no other file has, "
        "and is UTF-8 text",
    )
