"""Where migrations come from: a folder, or the files packaged with ampd; read once, before anything connects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InvalidMigration
from .migration import BOM, Migration, checksum, parse_file_name

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.resources.abc import Traversable


def read_migrations(directory: str | Path | None = None) -> tuple[Migration, ...]:
    """Return the migrations of a folder, or the packaged ones, in the order of their versions.

    Files that are not `.sql`, `*.down.sql` files and subfolders are ignored.

    Raises:
        InvalidMigration: no such folder; or names outside `<version>_<name>.sql`, two files with one version, text that
            is not UTF-8 or holds a NUL byte. All offenders are named at once.
    """
    if directory is None:
        return _read(_packaged(), "ampd/migrations")
    folder = Path(directory)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InvalidMigration(
            f"the migrations folder {folder} {what}",
            file=str(folder),
            hint="give it with --migrations DIR or metadata_db.migrations.dir; "
            "a relative path in the configuration file is relative to that file",
        )
    return _read(folder, str(folder))


def _packaged() -> Path | Traversable:
    """Return the packaged folder; from a plain installation without importlib.resources, which costs 6 ms to import."""
    plain = Path(__file__).with_name("migrations")
    if plain.is_dir():
        return plain
    from importlib.resources import files

    return files("ampd") / "migrations"


def _read(folder: Path | Traversable, shown: str) -> tuple[Migration, ...]:
    try:
        entries = sorted(
            (entry.name, entry.read_bytes())
            for entry in folder.iterdir()
            if entry.name.endswith(".sql") and not entry.name.endswith(".down.sql") and not entry.is_dir()
        )
    except OSError as error:
        raise InvalidMigration(
            f"the migrations in {shown} cannot be read: {error.strerror or error}",
            file=str(getattr(error, "filename", None) or shown),
            hint="check the permissions of the folder and its files",
        ) from error
    migrations, offences = _parse(entries, shown)
    if offences:
        first_file = f"{shown}/{offences[0][0]}"
        if len(offences) == 1:
            message = f"{first_file} {offences[0][1]}"
        else:
            listed = "".join(f"\n  {name} {what}" for name, what in offences)
            message = f"{len(offences)} files in {shown} cannot be used as migrations:{listed}"
        raise InvalidMigration(
            message,
            file=first_file,
            hint="a migration file is named <version>_<name>.sql, with a version of 1 to 18 digits that no other file "
            "has, and is UTF-8 text",
        )
    return migrations


def _parse(entries: Iterable[tuple[str, bytes]], shown: str) -> tuple[tuple[Migration, ...], list[tuple[str, str]]]:
    by_version: dict[int, Migration] = {}
    offences: list[tuple[str, str]] = []
    for file_name, content in entries:
        parsed = parse_file_name(file_name)
        if parsed is None:
            offences.append((file_name, "is not named <version>_<name>.sql"))
            continue
        version, name = parsed
        if version in by_version:
            twin = by_version[version].file.rpartition("/")[2]
            offences.append((file_name, f"has version {version}, and so has {twin}"))
        if b"\0" in content:
            line = content.count(b"\n", 0, content.index(b"\0")) + 1
            offences.append((file_name, f"holds a NUL byte in line {line}"))
            continue
        try:
            sql = content.removeprefix(BOM).decode()
        except UnicodeDecodeError as error:
            line = content.removeprefix(BOM).count(b"\n", 0, error.start) + 1
            offences.append((file_name, f"is not UTF-8 text (line {line})"))
            continue
        by_version.setdefault(version, Migration(version, name, f"{shown}/{file_name}", sql, checksum(content)))
    return tuple(by_version[version] for version in sorted(by_version)), offences
