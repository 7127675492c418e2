"""A migration as a value: its file name, its bytes, its checksum, the directives it begins with. Pure."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

BOM = b"\xef\xbb\xbf"
LONGEST_VERSION = 18  # digits: any number of so many fits a bigint
PACKAGED = "ampd/migrations"  # how the packaged folder is shown

# What may stand before the first statement. A nested block comment ends early here; who writes directives behind one?
_LEADING = re.compile(r"\s+|(?P<comment>--[^\r\n]*)|/\*.*?\*/", re.DOTALL)
_DIRECTIVE = r"--\s*(no-transaction|lock-timeout|statement-timeout)(?![\w-])\s*+:?(.*)"
_DURATION = r"(?i)([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|h)?"
_UP, _DOWN = r"[_.\s-](?:up|do)\Z", r"[_.\s-](?:down|undo|rollback)\Z"
_UNIT = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_LONGEST_SECS = 2_147_483  # the server counts milliseconds in 32 bits


# There can be thousands of these: without a part in cycles they need not delay Python's collector.
class Migration(msgspec.Struct, frozen=True, gc=False):
    """One file of a migration folder, read once."""

    version: int
    name: str
    file: str
    sql: str
    checksum: bytes

    @property
    def label(self) -> str:
        """Return version and name: `42 create_jobs`."""
        return f"{self.version} {self.name}"

    @property
    def is_transactional(self) -> bool:
        """Return whether it runs in one transaction, as far as its directives can be read."""
        with suppress(DirectiveError):
            return not directives(self.sql).no_transaction
        return True


class AppliedMigration(msgspec.Struct, frozen=True, gc=False):
    """One row of the history table; `finished_at` is None while a no-transaction migration runs or was interrupted."""

    version: int
    name: str
    checksum: bytes
    started_at: datetime
    finished_at: datetime | None
    statements_done: int
    applied_by: str
    ampd_version: str
    done_checksum: bytes | None = None

    @property
    def is_baseline(self) -> bool:
        """Return whether it was recorded without being run."""
        return " baseline" in self.ampd_version

    @property
    def duration_ms(self) -> int | None:
        """Return how long it ran, in milliseconds; None while unfinished, and for a baseline, which never ran."""
        if self.finished_at is None or self.is_baseline:
            return None
        return round((self.finished_at - self.started_at).total_seconds() * 1000)


class Directives(msgspec.Struct, frozen=True):
    """What the leading comment lines of a file ask for; durations in seconds, None where not given."""

    no_transaction: bool = False
    lock_timeout: float | None = None
    statement_timeout: float | None = None


class DirectiveError(ValueError):
    """A leading directive that cannot be read; `line` (from 1) and `offset` say where it stands."""

    def __init__(self, message: str, line: int, offset: int) -> None:
        super().__init__(message)
        self.line = line
        self.offset = offset


def parse_file_name(file_name: str) -> tuple[int, str] | None:
    """Return version and name of `<version>_<name>.sql` or `<version>_<name>.up.sql`; None for any other name."""
    version, _, rest = file_name.partition("_")
    name = rest.removesuffix(".sql")
    if name in ("", rest) or len(version) > LONGEST_VERSION or not (version.isascii() and version.isdecimal()):
        return None
    return int(version), name.removesuffix(".up") or name


def reversals(migrations: Iterable[Migration]) -> dict[int, Migration]:
    """Return, by the version of each migration whose name says that it undoes another, that other one.

    `2_a_down.sql` undoes `1_a.sql` or `1_a_up.sql`, for tools that take the two for a pair.
    """
    by_name = {re.sub(_UP, "", each.name.lower()): each for each in migrations}
    named = ((each, each.name.lower()) for each in by_name.values())
    downs = ((each, re.sub(_DOWN, "", name)) for each, name in named if re.search(_DOWN, name))
    return {down.version: by_name[what] for down, what in downs if what in by_name}


def checksum(content: bytes) -> bytes:
    """Return the SHA-256 of a file's bytes with a leading BOM dropped and CRLF turned into LF.

    For an LF file it equals what `sha256sum FILE` prints; a Windows checkout has the same one.
    """
    return sha256(with_line_feeds(content.removeprefix(BOM))).digest()


def with_line_feeds(piece: bytes) -> bytes:
    """Return a piece of a file, between whose CR and LF it was not cut, with LF in place of CRLF."""
    return piece.replace(b"\r\n", b"\n")


def directives(sql: str) -> Directives:
    """Read `-- no-transaction`, `-- lock-timeout: 2s` and `-- statement-timeout: 10min` from the leading comments.

    Raises:
        DirectiveError: a duration that is not a number with one of the units ms, s, min, h (seconds without one), or
            that is longer than the server's timeouts can be.
    """
    found: dict[str, float | bool] = {}
    position = 0
    while leading := _LEADING.match(sql, position):
        position = leading.end()
        match = re.fullmatch(_DIRECTIVE, leading["comment"] or "")
        if not match:
            continue
        directive, value = match[1], match[2].strip()
        if directive == "no-transaction":
            found["no_transaction"] = True
            continue
        duration = re.fullmatch(_DURATION, value)
        seconds = float(duration[1]) * _UNIT[(duration[2] or "s").lower()] if duration else -1
        if not 0 <= seconds <= _LONGEST_SECS:
            wanted = "at most 596h" if duration else "a duration such as 500ms, 2s or 10min"
            line = sql.count("\n", 0, leading.start()) + 1
            raise DirectiveError(f"`-- {directive}:` needs {wanted}, not {value!r}", line, leading.start())
        found[directive.replace("-", "_")] = seconds
    return msgspec.convert(found, Directives)
