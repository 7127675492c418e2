"""What is to be recorded as applied, and what speaks against it. Pure."""

from __future__ import annotations

import msgspec

from ampd.migration import Migration


class Record(msgspec.Struct, frozen=True):
    """A migration to record as applied; `applied_at` is the server's text for when, None for now."""

    migration: Migration
    applied_at: str | None = None


class Baseline(msgspec.Struct, frozen=True):
    """What a baseline would record; `source` is the tool whose history says so, None for a person's word."""

    records: tuple[Record, ...]
    source: str | None = None
    warnings: tuple[str, ...] = ()

    def text(self) -> str:
        """Return a line for each migration: version, name, and when it was applied, as far as that is known."""
        rows = [(each.migration.label, (each.applied_at or "")[:19]) for each in self.records]
        width = max((len(label) for label, _ in rows), default=0)
        return "\n".join(f"  {label.ljust(width)}  {when}".rstrip() for label, when in rows)


def up_to(files: tuple[Migration, ...], version: int) -> tuple[Record, ...]:
    """Return every file up to a version, as a person's word has it."""
    return tuple(Record(file) for file in files if file.version <= version)
