"""Events: typed, frozen, public, and a blocker told in one line."""

from datetime import UTC, datetime

import pytest

import ampd
from ampd.events import Blocker, Event, Warned, ignore

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("blocker", "line"),
    [
        (
            Blocker(7, "amp", "psql", "10.0.0.1", "idle in transaction", NOON, "SELECT * FROM jobs"),
            "pid 7: user amp, application psql, from 10.0.0.1, idle in transaction, since 2026-01-02 12:00:00+0000, "
            "SELECT * FROM jobs",
        ),
        (Blocker(7, None, None, None, None, None, None), "pid 7: user ?, application ?, state unknown"),
        (Blocker(7, "amp", "", None, "active", None, ""), "pid 7: user amp, application ?, active"),
        (
            Blocker(7, "amp", "service", None, "idle in transaction", NOON, "SELECT 1", own_pool=True),
            "pid 7, a connection of this very process's own pool, idle in transaction",
        ),
        (
            Blocker(7, None, None, None, None, None, None, own_pool=True),
            "pid 7, a connection of this very process's own pool, state unknown",
        ),
    ],
)
def test_a_blocker_in_one_line(blocker: Blocker, line: str) -> None:
    """A blocker tells who it is and what it does, as far as the role may see it."""
    assert blocker.describe() == line


def test_every_event_is_public() -> None:
    """Whatever `on_event=` receives has a public name to match it by."""
    public = {getattr(ampd, name) for name in ampd.__all__}
    assert Warned in Event.__subclasses__()
    assert [each.__name__ for each in Event.__subclasses__() if each not in public] == []


def test_events_are_values() -> None:
    """An event is equal to its like, and cannot be changed by whoever receives it."""
    event = Warned(message="so")
    assert event == Warned(message="so")
    with pytest.raises(AttributeError):
        event.message = "otherwise"  # type: ignore[misc]
    ignore(event)
