"""Where in a migration an error stands: its file, the line and the column, and an excerpt. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ampd.sql.location import excerpt, locate

if TYPE_CHECKING:
    from collections.abc import Callable

    from ampd.migration import Migration


def location_of(migration: Migration, offset: int | None = None, hide: Callable[[str], str] = str) -> dict[str, Any]:
    """Return the fields of an error at an offset of the script; without an offset those for the file as a whole.

    `hide` takes secrets out of the excerpt.
    """
    fields: dict[str, Any] = {"version": migration.version, "file": migration.file}
    if offset is not None:
        place = locate(migration.sql, offset)
        shown = excerpt(migration.sql, offset, file=migration.file, hide=hide, place=place)
        fields |= {"line": place[0], "column": place[1], "excerpt": shown}
    return fields
