"""Consecutive migrations that go together: each a transaction of its own, many of them in one message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ampd.history.table import History

    from .prepared import Execution


LONGEST_MESSAGE = 512 * 1024  # characters of scripts, and of what is added to them
ENVELOPE = 1280  # characters that are added to each, at most
WHOLE_ENVELOPE = 11 * 1024  # the same with the whole check: so many where others use the session


class Batch:
    """Migrations that are applied in order, and how far that has come."""

    def __init__(
        self, executions: Sequence[Execution], on_applied: Callable[[Execution], None], *, before_creation: str = ""
    ) -> None:
        """Keep them, and a function to call with each as soon as it is known to be committed.

        `before_creation` is PL/pgSQL to run before a history is created.
        """
        self.before_creation = before_creation
        self._executions = executions
        self._on_applied = on_applied
        self.done: int = 0
        self.at_end: bool = False  # the current one's script has ended: whether it is committed only the history tells
        self.one_by_one = False  # each in a message of its own, since the server has refused one of several
        history = executions[0].history
        # The history once the first transaction has made it.
        self.created: History = msgspec.structs.replace(history, table_exists=True, schema_exists=True)
        # Each migration makes the whole check, and nothing is prepared: that would often find something changed, as it
        # always does with row level security.
        self.whole_checks: bool = history.table is not None and history.table.row_security
        self._before = list(_newest_before(history, [each.migration.version for each in executions]))

    def __len__(self) -> int:
        return len(self._executions)

    def __getitem__(self, number: int) -> Execution:
        return self._executions[number]

    def current(self) -> Execution:
        """Return the migration that runs, or is the next to run; the last one when all are applied."""
        return self._executions[min(self.done, len(self) - 1)]

    def reach(self, number: int) -> None:
        """Take those before a migration as applied."""
        self.at_end = False
        while self.done < min(number, len(self)):
            execution = self._executions[self.done]
            self.done += 1
            self._on_applied(execution)

    def next_message(self, start: int) -> range:
        """Return the numbers of those that go into the next message, which begins with that one."""
        stop = start + 1
        if not self.one_by_one:
            size = self._size(start)
            while stop < len(self) and (size := size + self._size(stop)) <= LONGEST_MESSAGE:
                stop += 1
        return range(start, stop)

    def _size(self, number: int) -> int:
        return len(self._executions[number].migration.sql) + (WHOLE_ENVELOPE if self.whole_checks else ENVELOPE)

    def newest_before(self, number: int) -> tuple[str, int | None]:
        """Return `History.newest` as a migration of the batch has to find it, and the version in it."""
        return self._before[number]

    def history(self, number: int) -> History:
        """Return the history as a migration finds it, but for the rows of this batch."""
        return self._executions[0].history if number == 0 else self.created


def _newest_before(history: History, versions: Iterable[int]) -> Iterator[tuple[str, int | None]]:
    text, newest = history.newest, history.newest_version
    for version in versions:
        yield text, newest
        if newest is None or version > newest:
            text, newest = str(version), version
