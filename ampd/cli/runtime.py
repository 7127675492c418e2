"""Running work from the command line: signals, exit codes, streams that may be gone."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, TextIO, TypeVar

from ampd.display import visible
from ampd.errors import AmpdError, MigrationInterrupted

from .messages import terminal_columns, told

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from ampd.events import Event, OnEvent
    from ampd.report import Report

    from .progress import Progress


T = TypeVar("T")


_NOWHERE_TO_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO)


def survive(error: OSError) -> None:
    """Go on without a stdout that can no longer be written to; raise any other error again."""
    if error.errno not in _NOWHERE_TO_WRITE:
        raise error
    abandon(sys.stdout)
    if error.errno != errno.EPIPE:  # else the reader of our output has closed it
        say(f"error: the output cannot be written: {error.strerror}")


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a document was asked for, also by a wrong command line."""
    options = (each.partition("=") for each in _options(arguments))
    values = [value.lower() for name, _, value in options if name == "--json"]
    return bool(values) and values[-1] not in ("no", "n", "0", "false", "f")


def wants_findings(arguments: Sequence[str]) -> bool:
    """Return whether the document of `lint --format json` was asked for, also by a wrong command line."""
    before = _options(arguments)
    formats = [each for each in " ".join(before).replace("--format ", "--format=").split() if "--format=" in each]
    return "lint" in before and formats[-1:] == ["--format=json"]


def _options(arguments: Sequence[str]) -> list[str]:
    return list(takewhile(lambda each: each != "--", arguments))


class Signalled(Exception):
    """A signal has ended the command: its number, the message to print, and how far the run had come."""

    def __init__(self, number: int, told: str, report: Report | None) -> None:
        super().__init__(number)
        self.number = number
        self.told = told
        self.report = report


_LAST_CALL_SECS = 0.9


def run_to_end(progress: Progress, work: Callable[[], Awaitable[T]], *, stopping: bool = False) -> T:
    """Run the command's coroutine; the first SIGINT or SIGTERM cancels it, and `Signalled` is raised.

    With `stopping` a signal is how the command is meant to end, once nothing is running any more. Without, whatever
    keeps it from ending in time is left behind: a script being read, a name server that says nothing, a dead network.
    """
    import asyncio
    import signal
    from threading import Timer

    import anyio

    caught: list[int] = []
    the_first = iter((True,))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def signalled() -> Signalled:
        name = signal.Signals(caught[0]).name
        told = "stopped" if stopping and progress.idle else progress.interrupted()
        return Signalled(caught[0], f"{name}: {told}", progress.stopped.report if progress.stopped else None)

    def leave() -> None:
        progress.clear()
        os._exit(end_signalled(signalled(), json=wants_json(sys.argv[1:])))

    last_call = Timer(_LAST_CALL_SECS, leave)
    last_call.daemon = True

    async def until_signalled() -> T:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:

            def on_signal(number: int, _: object) -> None:
                for _ in the_first:  # an iterator lets one in, even of two that interrupt each other
                    caught.append(number)
                    if not stopping:
                        last_call.start()
                    with suppress(RuntimeError):  # the loop is closed: the work was done by then
                        loop.call_soon_threadsafe(scope.cancel)

            for number in before:
                signal.signal(number, on_signal)
            return await work()
        raise signalled()

    try:
        return anyio.run(until_signalled)
    finally:
        last_call.cancel()
        progress.clear()
        for number, handler in before.items():  # what follows takes no time, and the first signal has chosen the code
            signal.signal(number, signal.SIG_IGN if caught else handler)


def end_signalled(signalled: Signalled, *, json: bool) -> int:
    """Print that a signal has ended the command, and return its exit code."""
    tell(signalled.told)
    if json:
        with suppress(OSError):  # stdout may be closed
            print_failure(MigrationInterrupted(signalled.told, conflicts=()), signalled.report)
    return 128 + signalled.number


def new_progress(*, quiet: bool = False, verbose: bool = False) -> Progress:
    """Return what prints the events of a run on stderr: none of them, or statements and notices as well."""
    from .progress import Progress

    verbose = verbose or os.environ.get("AMP_LOG", "").lower() in ("debug", "trace")
    return Progress(quiet=quiet, verbose=verbose and not quiet)


def with_spans(progress: Progress) -> OnEvent:
    """Return the progress; with spans, where somebody has set up OpenTelemetry, as `opentelemetry-instrument` does."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return progress
    from ampd.tracing import trace_events

    trace = trace_events()

    def both(event: Event) -> None:
        trace(event)
        progress(event)

    return both


def prepare_streams() -> None:
    """Make sure that both streams exist, and accept any text, whatever the locale."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


_NARROWEST = 20  # columns


def widen() -> None:
    """Have help made for more columns than a very narrow terminal has: in none it fails, in one or two never ends."""
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() else terminal_columns()
    if width is not None and width < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST if width else 80)  # none, where nobody knows how many there are


def abandon(stream: TextIO) -> None:
    """Discard what is still buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_failure(error: AmpdError, known: Report | None) -> None:
    """Print what failed, and how far it came if that is known, as the JSON document of `migrate`."""
    from ampd.report import Result, migrate_json

    facts = (known.current_version, known.applied, known.pending) if known else (None, (), ())
    _print_last(migrate_json(Result.FAILED, *facts, error.fields()))


def print_lint_failure(error: AmpdError) -> None:
    """Print what failed as the JSON document of `lint`."""
    from ampd.report import pretty_json

    _print_last(pretty_json({"result": "failed", "findings": [], "error": error.fields()}))


def _print_last(document: bytes) -> None:
    try:
        print_json(document)
    except OSError as unwritten:
        survive(unwritten)


def complain(error: AmpdError) -> None:
    """Print an error and its hint on stderr."""
    tell(f"error: {error}")


def tell(text: str) -> None:
    """Print a message on stderr, which may be closed."""
    with suppress(OSError):
        print(told(text, terminal_columns(sys.stderr)), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line on stderr, which may be closed."""
    with suppress(OSError):
        print(visible(text), file=sys.stderr, flush=True)


def print_result(text: str) -> None:
    """Print a text on stdout."""
    print(visible(text), flush=True)


def print_message(text: str) -> None:
    """Print a text for a person on stdout."""
    print(told(text, terminal_columns()), flush=True)


def print_script(pieces: Iterable[str]) -> None:
    """Print SQL as it is, in UTF-8 whatever the locale: a script that differs from what is run would be a lie."""
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.buffer.write(piece.encode(errors="backslashreplace"))
    sys.stdout.buffer.flush()


def print_json(document: bytes) -> None:
    """Print a document in UTF-8, as JSON is, whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(document + b"\n")
    sys.stdout.buffer.flush()
