"""`ampd lint`: what squawk finds in migration files, with what ampd knows of how they run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import Parameter

from ampd.errors import ConfigError

from .app import AS_CONFIGURED, MigrationsOption, WhereGiven, configure, read_path
from .runtime import print_json, print_message, print_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ampd.lint import Finding, Remark
    from ampd.migration import Migration


_SETTINGS = "./.squawk.toml"


def lint(
    *files: Annotated[Path, Parameter(name="FILE", converter=read_path)],
    migrations: MigrationsOption = None,
    format_: Annotated[Literal["text", "json", "github"] | None, Parameter(name="--format")] = None,
    where: WhereGiven = AS_CONFIGURED,
) -> int:
    """Report operations that lock or break a live database; exit 1 if there are any.

    Connects to nothing. Needs squawk: `pip install 'ampd-migrate[lint]'`.

    Example: `ampd lint --migrations db/migrations`

    Example: `ampd lint db/migrations/7_totals.sql --format json`

    Parameters
    ----------
    files:
        Files that are not applied yet, so that the tables which they create are new [default: all of the folder].
    format_:
        How to print the findings [default: github in GitHub Actions, else text].
    """
    from ampd import lint
    from ampd.report import pretty_json

    found, number = _findings(files, migrations, where)
    if format_ == "json":
        print_json(pretty_json({"result": "findings" if found else "clean", "findings": found}))
    else:
        in_github = format_ == "github" or (format_ is None and bool(os.environ.get("GITHUB_ACTIONS")))
        if in_github:
            print_result(lint.github(found, number))
        else:
            print_message(lint.text(found, number))
    return int(bool(found))


def _findings(files: Sequence[Path], directory: Path | None, where: WhereGiven) -> tuple[list[Finding], int]:
    from ampd import lint
    from ampd.resources import read_migrations

    if files and directory:
        raise ConfigError("both files and --migrations are given", hint="give the files, or their folder")
    configured = configure(where, directory, url_needed=False).migrations
    squawk = find_squawk()
    given = _read(files) if files else read_migrations(configured.dir)
    remarks = [(each, run_squawk(squawk, each)) for each in given]
    return lint.findings(remarks, pending=bool(files), exceptions=configured.lint_allow), len(given)


def _read(files: Sequence[Path]) -> list[Migration]:
    """Return the migrations in these files, each called by its path as given, in the order in which they run.

    Raises:
        ConfigError: one is not a migration.
    """
    from ampd.resources import read_migrations

    folders = {each.parent for each in files if os.path.isfile(each)}
    there = {folder / Path(each.file).name: each for folder in folders for each in read_migrations(folder)}
    if strange := [str(each) for each in files if each not in there]:
        raise ConfigError(
            f"{', '.join(strange)}: not a migration file",
            hint="give files <version>_<name>.sql that are there, or their folder with --migrations",
        )
    given = [msgspec.structs.replace(there[each], file=str(each)) for each in dict.fromkeys(files)]
    return sorted(given, key=lambda migration: migration.version)


def find_squawk() -> str:
    """Return the path of squawk: the one beside this Python, or else on PATH.

    Raises:
        ConfigError: there is none.
    """
    import shutil
    import sysconfig

    own = shutil.which("squawk", path=sysconfig.get_path("scripts"))
    if found := own or shutil.which("squawk"):
        return found
    raise ConfigError(
        "squawk, which finds what lint reports, is not installed", hint="pip install 'ampd-migrate[lint]'"
    )


def run_squawk(squawk: str, migration: Migration) -> list[Remark]:
    """Return what squawk says of a migration, which it is given as ampd runs it: without BOM, and from any archive.

    Of its settings it takes those of the working folder; by itself it would look for some in the folders above as well.

    Raises:
        ConfigError: it does not run, or is too old.
    """
    import subprocess

    from ampd.lint import Remark

    wrapped = "--assume-in-transaction" if migration.is_transactional else "--no-assume-in-transaction"
    settings = _SETTINGS if os.path.isfile(_SETTINGS) else os.devnull
    command = [squawk, "--reporter=json", wrapped, f"--config={settings}", f"--stdin-filepath={migration.version}.sql"]
    try:
        ended = subprocess.run(command, input=migration.sql.encode(), capture_output=True, check=False)
        return msgspec.json.decode(ended.stdout, type=list[Remark])
    except OSError as error:
        problem = f"cannot be run: {error.strerror}"
    except msgspec.DecodeError:
        problem = f"says: {ended.stderr.decode(errors='replace').strip() or f'nothing, exit code {ended.returncode}'}"
    raise ConfigError(f"{squawk} {problem}", hint="pip install --upgrade 'ampd-migrate[lint]'")
