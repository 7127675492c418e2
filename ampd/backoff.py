"""How long a run has waited for what others have, and how long it pauses between two attempts."""

from __future__ import annotations

import random
from time import monotonic

QUIET_SECS = 1.0  # a shorter wait is not reported
_REPORT_EVERY_SECS = 5.0
_RESTS = 5
_FIRST_PAUSE_SECS = 0.02


class Backoff:
    """A limit on one wait, a growing pause with jitter, and when to report it; all in seconds."""

    def __init__(self, limit: float, *, longest_pause: float, quiet_secs: float = QUIET_SECS) -> None:
        self.limit = limit
        self._longest_pause, self._quiet_secs = longest_pause, quiet_secs
        self.renew()

    def renew(self, since: float | None = None) -> None:
        """Reset the wait: it is over, or another one has begun at a time of `monotonic`."""
        self._begun = since
        self._reported = -_REPORT_EVERY_SECS
        self.pause: float = _FIRST_PAUSE_SECS

    def begin(self) -> None:
        """Begin the wait now, unless it has begun."""
        self._begun = self._begun or monotonic()

    @property
    def begun(self) -> bool:
        """Return whether the wait has begun."""
        return self._begun is not None

    @property
    def waited(self) -> float:
        """Return how long the wait has been; it begins when this is first asked."""
        self.begin()
        assert self._begun is not None
        return monotonic() - self._begun

    def should_report(self) -> bool:
        """Return whether to report the wait now: not in its first second, and then every few seconds."""
        due = self.waited >= self._quiet_secs and monotonic() - self._reported >= _REPORT_EVERY_SECS
        if due:
            self._reported = monotonic()
        return due

    def rest(self, secs: float) -> float:
        """Return how long to leave to others what an attempt has had for so many seconds: at least five times as long.

        It is never shorter than a pause, since an attempt may be refused at once. There is always room for one more
        attempt before the limit; without it the rest is negative.
        """
        rest = max(secs * _RESTS * random.uniform(1, 1.2), self.next_pause())
        return min(rest, self.limit - self.waited - secs)

    def next_pause(self) -> float:
        """Return how long to pause before the next attempt, which is never beyond the limit."""
        pause = min(self.pause * random.uniform(0.5, 1.5), max(0, self.limit - self.waited))
        self.pause = min(self.pause * 1.5, self._longest_pause)
        return pause
