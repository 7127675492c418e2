"""`python -m ampd`, and the console script."""

import signal
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Ctrl+C before the event loop takes over, in the middle of an import, should end the process and not trace back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
