"""`python -m ampd`, and the console script."""

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Before the event loop takes over, in the middle of an import, say, nothing is begun: end at once, without a
    # traceback. And the first process of a container hears no SIGTERM that it has no handler for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    gc.set_threshold(_OBJECTS)
    from .cli.commands import run

    code = run(sys.argv[1:])
    gc.freeze()  # else the interpreter searches them for garbage on its way out, three times
    sys.exit(code)


_OBJECTS = 100_000  # between two searches for garbage: more than a start makes, none of which is garbage


if __name__ == "__main__":
    main()
