"""The commands, and how a command line is run."""

from __future__ import annotations

import os
import re
import sys
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter, UnknownCommandError, UnusedCliTokensError

from ampd.errors import AmpdError, ConfigError
from ampd.redaction import learn_passwords

from .app import (
    AS_CONFIGURED,
    HOME,
    ConfigOption,
    Flag,
    JsonOption,
    MigrationsOption,
    UrlOption,
    Version,
    WhereGiven,
    app,
    configure,
    remember,
)
from .messages import terminal_columns
from .runtime import (
    Signalled,
    abandon,
    complain,
    end_signalled,
    new_progress,
    prepare_streams,
    print_failure,
    print_json,
    print_lint_failure,
    print_message,
    print_script,
    run_to_end,
    survive,
    wants_findings,
    wants_json,
    widen,
    with_spans,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ampd.apply.prepared import Execution
    from ampd.apply.rehearsal_report import Rehearsal
    from ampd.history.overview import Overview
    from ampd.report import Status


def migrate(
    *,
    check: Flag = False,
    dry_run: Flag = False,
    rehearse: Flag = False,
    strict: Flag = False,
    rehearse_secs: float | None = None,
    target: Version | None = None,
    json: JsonOption = False,
    quiet: Annotated[Flag, Parameter(alias="-q")] = False,
    verbose: Annotated[Flag, Parameter(alias="-v")] = False,
    migrations: MigrationsOption = None,
    where: WhereGiven = AS_CONFIGURED,
) -> int:
    """Apply the pending migrations in order, and exit.

    Idempotent, and safe to start many times at once: each migration runs in one transaction, in one process.

    Example: `ampd migrate --config /etc/amp/config.toml`

    Example: `ampd migrate --migrations db/migrations --check`

    Parameters
    ----------
    check:
        Change nothing; exit 1 unless the schema is exactly up to date.
    dry_run:
        Change nothing; print what would be applied as a script that psql can run, the history rows included.
    rehearse:
        Run what is pending for real in one transaction, show its locks and times, and roll it back.
    strict:
        With --rehearse: exit 1 if a lock would block the reads or writes of others.
    rehearse_secs:
        With --rehearse: hold the locks for at most so many seconds [default: 5].
    target:
        Stop after this version.
    quiet:
        Print errors only.
    verbose:
        Print each statement as well, and the server's notices [env: AMP_LOG=debug].
    """
    _check_rehearsal(rehearse=rehearse, other=check or dry_run, strict=strict, secs=rehearse_secs)
    progress = new_progress(quiet=quiet, verbose=verbose)
    metadata_db = configure(where, migrations, quiet=quiet)
    if rehearse:
        from ampd import preview

        secs = 5 if rehearse_secs is None else rehearse_secs
        rehearsing = partial(preview.rehearse, metadata_db, target=target, secs=secs, on_event=progress)
        return _rehearsed(run_to_end(progress, rehearsing), strict=strict, json=json, quiet=quiet)
    if progress.verbose:
        from ampd.postgres.passwords import password_for, url_redact
        from ampd.resources import read_migrations

        progress.files = {each.version: each for each in read_migrations(metadata_db.migrations.dir)}
        url = metadata_db.require_migrations_url()
        progress.redact = url_redact(url, password_for(url, {})[0])
    if check or dry_run:
        from ampd import preview

        work = partial(preview.dry_run, metadata_db, target=target, on_event=progress)
        return _examined(*run_to_end(progress, work), check=check, json=json, quiet=quiet)
    from ampd import migrator

    told = with_spans(progress)
    report = run_to_end(progress, lambda: migrator.migrate(metadata_db, target=target, on_event=told))
    if json:
        print_json(report.json())
    elif not quiet:
        print_message(report.text())
    return 0


def status(
    *,
    all: Flag = False,  # noqa: A002 - the name of the option
    json: JsonOption = False,
    migrations: MigrationsOption = None,
    where: WhereGiven = AS_CONFIGURED,
) -> int:
    """Show what is applied, pending and in conflict.

    Changes nothing, and needs no right but SELECT on the history table.

    Example: `ampd status --migrations db/migrations`

    Example: `ampd status --all --json`

    Parameters
    ----------
    all:
        Show every history of the database, whatever its schema and table, and how far it is; needs no migrations.
    """
    from ampd import migrator

    if all and migrations is not None:
        raise ConfigError("--all compares no files with the histories", hint="leave out --all, or --migrations")
    progress = new_progress()
    metadata_db = configure(where, migrations)
    found: Status | Overview
    if all:
        found = run_to_end(progress, lambda: migrator.overview(metadata_db, on_event=progress))
    else:
        found = run_to_end(progress, lambda: migrator.status(metadata_db, on_event=progress))
    if json:
        print_json(found.json())
    else:
        print_message(found.text(terminal_columns()))
    return 0


def resolve(
    version: Version,
    /,
    *,
    applied: Flag = False,
    rolled_back: Flag = False,
    migrations: MigrationsOption = None,
    where: WhereGiven = AS_CONFIGURED,
) -> int:
    """Resolve a `-- no-transaction` migration that was interrupted and cannot be resumed by itself.

    Look at the database first. Runs nothing; writes the history table only.

    Example: `ampd resolve 42 --applied`

    Example: `ampd resolve 42 --rolled-back --migrations db/migrations`

    Parameters
    ----------
    version:
        The version of the interrupted migration.
    applied:
        All of it has been done, by the interrupted run or by hand: record it as applied.
    rolled_back:
        None of it is left: forget it, and let the next `ampd migrate` run it from the beginning.
    """
    from ampd import resolution
    from ampd.plan import Resolution

    if applied == rolled_back:
        remember(where, migrations)
        raise ConfigError(
            "say what became of the migration: either --applied or --rolled-back",
            hint=f"`ampd resolve {version} --applied` if all of it is done, "
            f"`ampd resolve {version} --rolled-back` if nothing of it is left",
        )
    progress = new_progress()
    metadata_db = configure(where, migrations)
    settled = Resolution.APPLIED if applied else Resolution.ROLLED_BACK
    found = run_to_end(progress, lambda: resolution.resolve(metadata_db, version, settled, on_event=progress))
    print_message(f"{found.database}: version {version} is recorded as {settled.value}; {found.summary()}")
    return 0


_COMMANDS = {  # the module in which each is, which is loaded with its first use, and its section of README.md
    "migrate": ("commands", "from-a-terminal-or-a-pipeline"),
    "status": ("commands", "from-a-terminal-or-a-pipeline"),
    "baseline": ("baseline", "coming-from-another-tool"),
    "resolve": ("commands", "when-something-is-wrong"),
    "new": ("new", "migration-files"),
    "lint": ("lint", "before-a-migration-is-merged"),
    "solo": ("solo", "a-database-on-your-own-machine"),
}
for _place, (_name, (_module, _section)) in enumerate(_COMMANDS.items()):
    app.command(f"ampd.cli.{_module}:{_name}", sort_key=_place, help_epilogue=f"See {HOME}#{_section}")


@cache
def _register_completion() -> None:
    app.register_install_completion_command()


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: ConfigOption = None,
    url: UrlOption = None,
) -> int:
    before = [f"--config={config}"] if config is not None else []
    before += [f"--url={url}"] if url is not None else []
    try:
        return int(app([*tokens[:1], *before, *tokens[1:]] if tokens else []) or 0)
    except OSError as error:
        if error.filename is None or tokens[:1] != ("--install-completion",):
            raise
        hint = "`ampd --install-completion --output FILE` writes it to another place"
        raise ConfigError(f"{error.filename}: {error.strerror}", hint=hint) from error


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; no error of a user's ends in a traceback."""
    prepare_streams()
    widen()
    if "--install-completion" in arguments or _COMMANDS.keys().isdisjoint(arguments):
        _register_completion()  # where it is asked for, or listed: to load it takes a tenth of the time of a start
    learn_passwords((*arguments, *(value for name, value in os.environ.items() if name.startswith("AMP_"))))
    code = _outcome(arguments)
    try:
        sys.stderr.flush()
    except OSError:
        abandon(sys.stderr)  # else the interpreter would fail on what is still buffered
    return code


def _level(arguments: Sequence[str]) -> App:
    """Return what takes a command line: the application, unless options stand before the command or there is none."""
    if arguments and arguments[0] in _COMMANDS:
        return app
    for name in _COMMANDS:
        app[name]  # is loaded, to be listed
    return app.meta


def _outcome(arguments: Sequence[str]) -> int:
    try:
        try:
            return int(_level(arguments)(list(arguments), exit_on_error=False, print_error=False) or 0)
        except CycloptsError as error:
            raise _command_line_error(error) from None
    except AmpdError as error:
        if wants_json(arguments):
            print_failure(error, error.report)
        elif wants_findings(arguments):
            print_lint_failure(error)
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
    if isinstance(error, UnknownCommandError) and (token := (error.unused_tokens or [""])[0]).startswith("-"):
        return ConfigError(
            f"unknown option before the command: {token}",
            hint="only --config and --url may stand there; `ampd --help` lists the commands",
        )
    if isinstance(error, UnusedCliTokensError):
        message = f"unexpected argument: {' '.join(error.unused_tokens or ())}"
    if itself := re.fullmatch(r"Unknown option: (\S+)\. Did you mean \1\?", message):  # it stands behind a --
        message = f"unexpected argument: {itself[1]}"
    if (unknown := re.match(r"Unknown option: --([a-z-]+)", message)) and (key := _key_of(unknown[1])):
        variable = f"AMP_CONFIG_{key.replace('.', '__').upper()}"
        return ConfigError(f"unknown option: --{unknown[1]}", hint=f"it is configured: by {key}, or {variable}")
    command = " ".join(("ampd", *(error.command_chain or ())))
    return ConfigError(message[:1].lower() + message[1:], hint=f"`{command} --help` lists the options")


def _key_of(option: str) -> str | None:
    """Return the key of the configuration that somebody has taken for an option; None if there is none."""
    from msgspec.structs import fields

    from ampd.config import MetadataDb, Migrations

    name = option.replace("-", "_")
    for section, struct in (("metadata_db", MetadataDb), ("metadata_db.migrations", Migrations)):
        if name in {field.name for field in fields(struct)}:
            return f"{section}.{name}"
    return None


def _examined(found: Status, executions: Sequence[Execution], *, check: bool, json: bool, quiet: bool) -> int:
    """Print what `--check` and `--dry-run` have found, from the plan that a run would follow."""
    from ampd.report import examined_json

    if json:
        print_json(examined_json(found))
    elif not check:
        from ampd.apply.psql_script import check_scriptable, psql_script

        check_scriptable(found, executions)
        print_script(psql_script(found, executions))
    elif not quiet:
        print_message(f"{found.database}: {found.summary()}")
    return int(check and not found.up_to_date)


def _check_rehearsal(*, rehearse: bool, other: bool, strict: bool, secs: float | None) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: names them.
    """
    if rehearse and other:
        raise ConfigError("--rehearse runs what is pending, and --check and --dry-run do not", hint="give one of them")
    if not rehearse and (strict or secs is not None):
        option = "--strict" if strict else "--rehearse-secs"
        raise ConfigError(f"{option} goes with --rehearse alone", hint=f"`ampd migrate --rehearse {option}`")
    if secs is not None and not 0 < secs <= _LONGEST_REHEARSAL_SECS:
        raise ConfigError(f"--rehearse-secs takes seconds up to {_LONGEST_REHEARSAL_SECS}, not {secs:g}")


_LONGEST_REHEARSAL_SECS = 3600


def _rehearsed(rehearsal: Rehearsal, *, strict: bool, json: bool, quiet: bool) -> int:
    """Print what `--rehearse` has found."""
    if json:
        print_json(rehearsal.json())
    elif not quiet and (text := rehearsal.text()):
        print_message(text)
    if rehearsal.error:
        complain(rehearsal.error)
    return int(rehearsal.error is not None or (strict and rehearsal.blocks))
