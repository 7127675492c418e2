"""`ampd baseline`: shows what it would record, asks, and records it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ampd.errors import ConfigError

from .app import AS_CONFIGURED, Flag, JsonOption, MigrationsOption, Version, WhereGiven, configure
from .messages import terminal_columns
from .runtime import new_progress, print_json, print_message, run_to_end, tell

if TYPE_CHECKING:
    from ampd.takeover.proof import Baseline


def baseline(
    version: Version | None = None,
    /,
    *,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    yes: Flag = False,
    json: JsonOption = False,
    migrations: MigrationsOption = None,
    where: WhereGiven = AS_CONFIGURED,
) -> int:
    """Record migrations as applied without running them, in a database that has them already.

    Shows what it would write, and asks. Writes the history table only.

    Example: `ampd baseline 42 --migrations db/migrations`

    Example: `ampd baseline --from flyway --migrations db/migrations --yes`

    Parameters
    ----------
    version:
        Record every file up to this one: your word that the database contains what they make.
    source:
        Record what this tool's history proves to be applied: sqlx, flyway, alembic, goose, golang-migrate, dbmate,
        node-pg-migrate, yoyo, or auto for the one that is there.
    yes:
        Write without asking; needed where nobody can be asked.
    """
    from ampd.redaction import Hidden
    from ampd.report import count
    from ampd.run import Run
    from ampd.takeover.baseline import Takeover, check_question

    progress = new_progress()
    metadata_db = configure(where, migrations)
    check_question(version, source)

    async def look() -> tuple[Takeover, Baseline]:
        takeover = Takeover(await Run.of(Hidden(metadata_db), target=version, on_event=progress), source)
        return takeover, await takeover.examine()

    takeover, found = run_to_end(progress, look)
    if found.records:
        tell(f"{takeover.database}: to be recorded as applied, without running them:\n{found.text(terminal_columns())}")
        if not yes:
            _ask()
    status = run_to_end(progress, lambda: takeover.record(found))
    if json:
        print_json(status.json())
    else:
        done = f"recorded {count(len(found.records), 'migration')} as applied" if found.records else "nothing to record"
        print_message(f"{status.database}: {done}; {status.summary()}")
    return 0


def _ask() -> None:
    """Ask on the terminal whether to write.

    Raises:
        ConfigError: there is nobody to ask, or the answer is not yes.
    """
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            "nothing was recorded: this is no terminal, so nobody can be asked",
            hint="look at these rows, and run it again with --yes",
        )
    print("Record them? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was recorded")
