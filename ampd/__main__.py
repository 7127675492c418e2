"""`python -m ampd`, and the console script."""

import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Before the event loop takes over, in the middle of an import, say, nothing is begun: end at once, without a
    # traceback. And the first process of a container hears no SIGTERM that it has no handler for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    from .cli.commands import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
