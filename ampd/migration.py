"""A migration as a value: its file name, its bytes, its checksum, the directives it begins with. Pure."""

from __future__ import annotations

import re
from datetime import datetime
from hashlib import sha256

import msgspec

FILE_NAME = re.compile(r"(?P<version>[0-9]{1,18})_(?P<name>.+?)(?:\.up)?\.sql", re.DOTALL)
BOM = b"\xef\xbb\xbf"

# Everything before the first token: white space, line comments, block comments (nested ones end the match early, which
# only means that directives behind them are not looked for).
_LEADING = re.compile(r"(?:\s+|--[^\r\n]*|/\*.*?\*/)*", re.DOTALL)
_DIRECTIVE = re.compile(
    r"^[^\S\n]*--[^\S\n]*(no-transaction|lock-timeout|statement-timeout)\b[^\S\n]*:?(.*)$", re.MULTILINE
)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|h)?\s*", re.IGNORECASE)
_UNIT = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}


class Migration(msgspec.Struct, frozen=True):
    """One file of a migration folder, read once."""

    version: int
    name: str
    file: str
    sql: str
    checksum: bytes

    @property
    def label(self) -> str:
        """Return version and name as people say it: `42 create_jobs`."""
        return f"{self.version} {self.name}"


class AppliedMigration(msgspec.Struct, frozen=True):
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
    def duration_ms(self) -> int | None:
        """Return how long it ran, in milliseconds; None while unfinished."""
        if self.finished_at is None:
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
    match = FILE_NAME.fullmatch(file_name)
    return (int(match["version"]), match["name"]) if match else None


def checksum(content: bytes) -> bytes:
    """Return the SHA-256 of a file's bytes with a leading BOM dropped and CRLF turned into LF.

    For an LF file it equals what `sha256sum FILE` prints; a Windows checkout has the same one.
    """
    return sha256(content.removeprefix(BOM).replace(b"\r\n", b"\n")).digest()


def directives(sql: str) -> Directives:
    """Read `-- no-transaction`, `-- lock-timeout: 2s` and `-- statement-timeout: 10min` from the leading comments.

    Raises:
        DirectiveError: a duration that is not a number with one of the units ms, s, min, h (seconds without one).
    """
    leading = _LEADING.match(sql)
    found: dict[str, float | bool] = {}
    for match in _DIRECTIVE.finditer(leading[0] if leading else ""):
        directive, value = match.groups()
        if directive == "no-transaction":
            found["no_transaction"] = True
        else:
            duration = _DURATION.fullmatch(value)
            if not duration:
                line = sql.count("\n", 0, match.start()) + 1
                raise DirectiveError(
                    f"`-- {directive}:` needs a duration such as 500ms, 2s or 10min, not {value.strip()!r}",
                    line,
                    match.start(),
                )
            found[directive.replace("-", "_")] = float(duration[1]) * _UNIT[(duration[2] or "s").lower()]
    return msgspec.convert(found, Directives)
