"""What is to be recorded as applied, and what speaks against it. Pure."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from hashlib import sha384
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

from ampd.migration import Migration

from .tools import GONE, NOT_RUN, TOOLS

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from .tools import Row


class Record(msgspec.Struct, frozen=True):
    """A migration to record as applied; `applied_at` is the tool's text for when, None for now."""

    migration: Migration
    applied_at: str | None = None


class Baseline(msgspec.Struct, frozen=True):
    """What a baseline would record; `source` is the tool whose history says so, None for a person's word."""

    records: tuple[Record, ...]
    source: str | None = None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def text(self, columns: int | None = None) -> str:
        """Return a line for each migration: version, name, and where it fits and is known, when it was applied."""
        rows = [(each.migration.label, (each.applied_at or "")[:16]) for each in self.records]
        width = max((len(label) for label, _ in rows), default=0)
        lines = [f"  {label.ljust(width)}  {when}".rstrip() for label, when in rows]
        if columns and max(map(len, lines), default=0) > columns:
            lines = [f"  {label}" for label, _ in rows]
        return "\n".join(lines)


def up_to(files: Sequence[Migration], version: int) -> tuple[Record, ...]:
    """Return every file up to a version, as a person's word has it."""
    return tuple(Record(file) for file in files if file.version <= version)


def proved(
    source: str,
    rows: Sequence[Row],
    files: Sequence[Migration],
    version: int | None,
    *,
    recorded: Container[int] = (),
    out_of_order: bool = False,
) -> Baseline:
    """Return what a tool's history proves to be applied of these files, and all that speaks against it.

    Args:
        source: the tool's name, as in TOOLS.
        rows: its history, in the order in which it was written.
        files: in the order of their versions.
        version: what a person says the newest one is.
        recorded: versions that are in ampd's history already.
        out_of_order: whether a file may be pending below one that is applied.
    """
    if source == "alembic":
        return _current_revision(rows, files, version)
    standing, floor, warnings = _standing(source, rows)
    records, unproved = _records(source, standing, files)
    problems = [row.undone for row in rows if not row.is_done] + unproved
    if not standing and floor < 0:
        begins = "is where that history begins, and no file can have such a version"
        problems += [f"{row.label} {begins}" for row in rows if row.kind == _BEGINNING]
    newest = max(records, default=floor)
    if TOOLS[source].is_current:
        if len(standing) > 1:
            problems.append(f"{len(standing)} rows are current ({', '.join(row.label for row in standing)})")
        floor = newest
    for file in files:
        if file.version <= floor and file.version not in records:
            records[file.version] = Record(file)
        elif not (file.version > newest or file.version in records or file.version in recorded or out_of_order):
            problems.append(f"{file.file} is not among the applied ones, and newer ones are")
    if version is not None and version != newest:
        problems.append(f"the newest that is applied is {newest}, not {version}")
    in_order = tuple(record for _, record in sorted(records.items()))
    return Baseline(in_order, source, tuple(problems), tuple(warnings))


_BEGINNING = "BASELINE"  # the kind of the row that `flyway baseline` writes, which stands for no file


def _standing(source: str, rows: Sequence[Row]) -> tuple[list[Row], int, list[str]]:
    """Return the rows whose migrations are applied, and not taken back by a later row; a version; and warnings.

    Whatever is not above that version was there before the tool's history began; it is -1 where nothing was, and where
    the history begins at a version such as 1.2: which files are below that, nobody knows.
    """
    standing: dict[str, Row] = {}
    floor = -1
    warnings: list[str] = []
    for row in rows:
        if row.kind == GONE:
            standing.pop(row.version or row.name, None)
        elif row.kind.endswith("BASELINE") and row.version.isdecimal():
            floor = int(row.version)
        elif source == "flyway" and not row.version and row.kind != NOT_RUN:
            warnings.append(f"{row.label} is repeatable, which ampd's migrations are not: it is left out")
        elif row.is_done and row.kind not in (NOT_RUN, _BEGINNING):
            standing[row.version or row.name] = row
    return list(standing.values()), floor, warnings


def _records(source: str, standing: Iterable[Row], files: Sequence[Migration]) -> tuple[dict[int, Record], list[str]]:
    """Return what to record for rows, by version, and what speaks against it: no file, another one, no time.

    A file that has changed since is among them: it is not also one that is missing.
    """
    records: dict[int, Record] = {}
    problems: list[str] = []
    finder = _Finder(files)
    for row in standing:
        file, problem = finder.find(source, row)
        if file is not None and file.version in records:
            problem = problem or f"{row.label} leads to {file.file}, and so does another one"
        if problem is not None:
            problems.append(problem)
        if file is not None:
            records[file.version] = Record(file, applied_at(row))
            if _TIME.fullmatch(row.at) and not applied_at(row):
                problems.append(f"{row.label} was applied at {row.at}, which is no time")
    return records, problems


def _current_revision(rows: Sequence[Row], files: Sequence[Migration], version: int | None) -> Baseline:
    """Return the files up to the one that has Alembic's revision in its name; else up to `version`, on a person's word.

    Alembic's history is that revision and nothing else: neither an order nor a checksum.
    """
    revisions = [row.name for row in rows]
    if len(revisions) != 1:
        listed = ", ".join(row.label for row in rows) or "none"
        return Baseline((), "alembic", (f"Alembic has not one current revision but {len(revisions)}: {listed}",))
    (revision,) = revisions
    named = [
        each for each in files if revision and revision in (str(each.version), each.name, each.name.partition("_")[0])
    ]
    if version is None and len(named) == 1:
        version = named[0].version
    if version is None:
        problem = f"the current revision is {rows[0].label}, and of the files at hand none has it in its name"
        return Baseline((), "alembic", (problem,))
    if named and version not in [each.version for each in named]:
        return Baseline((), "alembic", (f"the current revision is {rows[0].label}: that is {named[0].file}",))
    return Baseline(up_to(files, version), "alembic")


class _Finder:
    """Finds the file that a row of a tool's history stands for."""

    def __init__(self, files: Sequence[Migration]) -> None:
        self._by_version = {file.version: file for file in files}
        self._by_name: dict[str, list[Migration]] = {}
        self._by_label = {_plain(file.label): file for file in files}
        for file in files:
            self._by_name.setdefault(_plain(file.name), []).append(file)

    def find(self, source: str, row: Row) -> tuple[Migration | None, str | None]:
        """Return the file, None if there is none, and what is wrong with it, None if nothing is."""
        if not row.version:  # the tool knows it by the name of its file
            file = self._by_label.get(_plain(row.name.removesuffix(".up")).lstrip("0"))
        elif re.fullmatch("[0-9]{1,18}", row.version):
            file = self._by_version.get(int(row.version))
            if source == "flyway" and not (file and _plain(row.name) == _plain(file.name)):
                file = self._numbered_anew(row) or file
        else:  # a version such as 1.2, which no file can have
            named = self._named(source, row)
            if len(named) > 1:
                return None, f"{row.label} is applied, and may be any of {', '.join(each.file for each in named)}"
            file = named[0] if named else None
        if file is None:
            return None, f"{row.label} is applied, and there is no such file"
        if row.version and row.name and _plain(row.name) != _plain(file.name):
            return file, f"{row.label} is applied, and {file.file} has another name"
        kind = _CHECKSUMS.get(source)
        if kind and not row.checksum and row.kind in ("", "SQL"):  # of Flyway's, Java has none
            return file, f"{row.label} is applied, and its row has no {kind}"
        if row.checksum and _differs(source, row.checksum, file):
            return file, f"{row.label} is applied, and {file.file} has another {kind}: it was changed since"
        return file, None

    def _numbered_anew(self, row: Row) -> Migration | None:
        """Return the file with a row's name and checksum, if there is one: a V1.2 after V1 may have moved all."""
        named = self._by_name.get(_plain(row.name), []) if row.checksum else []
        same = [each for each in named if not _differs("flyway", row.checksum, each)]
        return same[0] if len(same) == 1 else None

    def _named(self, source: str, row: Row) -> list[Migration]:
        """Return the files of a row's name; of several the one with its checksum, else with its version's digits."""
        named = self._by_name.get(_plain(row.name), [])
        if len(named) > 1:
            named = [each for each in named if not _differs(source, row.checksum, each)] or named
        if len(named) > 1:
            digits = row.version.replace(".", "")  # V2024_01__views.sql may have become 202401_views.sql
            named = [each for each in named if str(each.version) == digits] or named
        return named


def _plain(name: str) -> str:
    """Return a name without what tools write in different ways: case, spaces, dots, dashes, underscores."""
    return re.sub(r"[\W_]", "", name).lower()


_CHECKSUMS = {"flyway": "CRC32", "sqlx": "SHA-384"}


def _differs(source: str, recorded: str, file: Migration) -> bool:
    """Return whether a checksum is that of a file in no form of its line ends."""
    unix = file.sql.replace("\r\n", "\n")
    if source == "flyway":
        return recorded != str(_crc32(unix))
    texts = (file.sql, unix, unix.replace("\n", "\r\n"))
    return recorded not in (sha384(text.encode()).hexdigest() for text in texts)


def _crc32(sql: str) -> int:
    """Return Flyway's checksum: the signed CRC32 of the lines without their ends."""
    checksum = crc32(re.sub(r"[\r\n]", "", sql).encode())
    return checksum - (1 << 32) if checksum >> 31 else checksum


_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?([+-]\d\d(:?\d\d)*)?")
_FARTHEST_ZONE = timedelta(hours=16)  # which PostgreSQL does not take any more


def applied_at(row: Row) -> str | None:
    """Return when a row's migration was applied, as text that the server reads; None if the tool does not say."""
    if not _TIME.fullmatch(row.at):
        return None
    try:
        zone = datetime.fromisoformat(row.at).utcoffset()
    except ValueError:
        return None
    return row.at if zone is None or abs(zone) < _FARTHEST_ZONE else None
