"""Where migrations come from: a folder, or the files packaged with ampd; read once, before anything connects."""

from __future__ import annotations

import os
from errno import ENOENT, ENOTDIR
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from .errors import InvalidMigration
from .migration import BOM, Migration, checksum, parse_file_name

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

PACKAGED = "ampd/migrations"  # how the packaged folder is shown


def read_migrations(directory: str | Path | None = None) -> tuple[Migration, ...]:
    """Return the migrations of a folder, or the packaged ones, in the order of their versions.

    Files that are not `.sql`, `*.down.sql` files and subfolders are ignored.

    Raises:
        InvalidMigration: no such folder; or files not named `<version>_<name>.sql`, two with one version, some that
            are no regular files, cannot be read, are not UTF-8 or hold a NUL byte. All offenders are named at once.
    """
    if directory is None:
        return _read(_packaged(), PACKAGED)
    if not str(directory):  # from a variable that is not set, say: it would be the working folder
        raise InvalidMigration("the migrations folder is an empty path", hint="write . for the working folder")
    return _read(Path(directory), str(Path(directory)))


def _packaged() -> Path | Traversable:
    """Return the packaged folder; from a plain installation without importlib.resources, which costs 6 ms to import."""
    plain = Path(__file__).with_name("migrations")
    if plain.is_dir():
        return plain
    from importlib.resources import files

    return files("ampd") / "migrations"


def _read(folder: Path | Traversable, shown: str) -> tuple[Migration, ...]:
    migrations: list[Migration] = []
    taken: dict[int, str] = {}
    offences: list[tuple[str, str]] = []
    for entry in _files(folder, shown):
        name_bytes = os.fsencode(entry.name)
        file_name = name_bytes.decode(errors="backslashreplace")
        parsed = parse_file_name(file_name)
        if parsed is None:
            offences.append((file_name, "is not named <version>_<name>.sql"))
            continue
        version, name = parsed
        if name_bytes != file_name.encode():
            offences.append((file_name, "has a name that is not UTF-8"))
        if (twin := taken.setdefault(version, file_name)) != file_name:
            offences.append((file_name, f"has version {version}, and so has {twin}"))
        try:
            if isinstance(entry, Path) and not S_ISREG(entry.stat().st_mode):  # reading a pipe would wait for ever
                offences.append((file_name, "is not a regular file"))
                continue
            content = entry.read_bytes()
            text = content.removeprefix(BOM)
            sql = text.decode()
        except OSError as error:
            offences.append((file_name, f"cannot be read: {error.strerror or error}"))
            continue
        except UnicodeDecodeError as error:
            offences.append((file_name, f"is not UTF-8 text (line {_line(text, error.start)})"))
            continue
        if b"\0" in text:
            offences.append((file_name, f"holds a NUL byte in line {_line(text, text.index(0))}"))
        migrations.append(Migration(version, name, f"{shown}/{file_name}", sql, checksum(content)))
    if offences:
        raise _unusable(offences, shown)
    return tuple(sorted(migrations, key=lambda migration: migration.version))


def _files(folder: Path | Traversable, shown: str) -> list[Path | Traversable]:
    try:
        entries: list[Path | Traversable] = [
            entry
            for entry in folder.iterdir()
            if entry.name.endswith(".sql") and not entry.name.endswith(".down.sql") and not entry.is_dir()
        ]
    except OSError as error:
        what = {ENOENT: "does not exist", ENOTDIR: "is not a folder"}.get(error.errno or 0)
        raise InvalidMigration(
            f"the migrations folder {shown} {what or f'cannot be read: {error.strerror or error}'}",
            file=shown,
            hint="give it with --migrations DIR or metadata_db.migrations.dir; "
            "a relative path in the configuration file is relative to that file",
        ) from error
    return sorted(entries, key=lambda entry: entry.name)


def _line(text: bytes, offset: int) -> int:
    return text.count(b"\n", 0, offset) + 1


def _unusable(offences: list[tuple[str, str]], shown: str) -> InvalidMigration:
    first_name, first_offence = offences[0]
    if len(offences) == 1:
        message = f"{shown}/{first_name} {first_offence}"
    else:
        listed = "".join(f"\n  {name} {what}" for name, what in offences)
        message = f"{len(offences)} faults in the files of {shown}:{listed}"
    return InvalidMigration(
        message,
        file=f"{shown}/{first_name}",
        hint="a migration file is named <version>_<name>.sql, with a version of 1 to 18 digits that no other file has, "
        "and is UTF-8 text",
    )
