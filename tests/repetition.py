"""How often the suite repeats what chance has a part in: little by default, AMPD_TEST_TIMES as often in a campaign."""

import os

from hypothesis import settings

TIMES = int(os.environ.get("AMPD_TEST_TIMES", "1"))


def examples(count: int) -> settings:
    """Let Hypothesis try a law with so many examples: always the same ones, but for a campaign."""
    return settings(max_examples=count * TIMES, deadline=None, derandomize=TIMES == 1)
