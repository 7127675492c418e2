"""`ampd new`: the next file of a folder, by its own numbering, and what cannot be one."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ampd import ConfigError, read_migrations
from ampd.cli.new import TEMPLATE, checked_name, create
from ampd.migration import Directives, directives
from tests.cli_output import seen
from tests.folders import write
from tests.servers import Ampd


def test_the_next_file_is_printed_and_is_a_migration(ampd: Ampd, tmp_path: Path) -> None:
    """Without any URL a file is made, its path is all of stdout, and its template is a migration without directives."""
    before = f"{datetime.now(UTC):%Y%m%d%H%M%S}"
    code, stdout, stderr = seen(ampd("new", "Create  Accounts", "--migrations", "m"))
    assert (code, stderr) == (0, "")
    assert (match := re.fullmatch(r"m/(\d{14})_create_accounts\.sql\n", stdout))
    assert before <= match[1] <= f"{datetime.now(UTC):%Y%m%d%H%M%S}"
    (made,) = read_migrations(tmp_path / "m")
    assert (made.name, made.sql, directives(made.sql)) == ("create_accounts", TEMPLATE, Directives())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["1_a.sql", "2_b.sql"], "3_x.sql"),
        (["0009_a.up.sql", "0009_a.down.sql"], "0010_x.sql"),
        (["99_a.sql", "0100_b.sql", "notes_7.sql", ".200_c.sql", "300_d.txt"], "0101_x.sql"),
        (["99991231235959_a.sql"], "99991231235960_x.sql"),
        (["9_a.sql"], "10_x.sql"),
    ],
)
def test_the_version_follows_those_that_are_there(tmp_path: Path, files: list[str], expected: str) -> None:
    """It is above the highest, as wide as that one is written, whatever else is in the folder."""
    write(tmp_path, dict.fromkeys(files, ""))
    assert create(tmp_path, "x") == tmp_path / expected


def test_two_at_once_get_a_version_each(tmp_path: Path) -> None:
    """Whoever makes files at the same moment overwrites none, and no two have one version."""
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: create(tmp_path / "m", f"n{number % 2}"), range(16)))
    assert len(set(made)) == len(read_migrations(tmp_path / "m")) == 16


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Add Jobs", "add_jobs"), (" a\tb\n", "a_b"), ("größe", "größe"), ("v1.2-x", "v1.2-x"), ("sql", "sql")],
)
def test_names_that_are_made_usable(name: str, slug: str) -> None:
    """Spaces become underscores and capitals small; whatever a file name may contain stays."""
    assert checked_name(name) == slug


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        (" _ ", "is empty"),
        ("../a", "contains a /"),
        ("a\x1bb", "contains a character that cannot be printed"),
        ("a\0b", "contains a character that cannot be printed"),
        ("a\udcff", "contains a character that cannot be printed"),
        ("a.sql", "ends in .sql: give it without the ending of its file"),
        ("a.UP", "ends in .up: give it without the ending of its file"),
        ("a.down", "ends in .down: give it without the ending of its file"),
        ("ä" * 120, "is too long for the name of a file"),
    ],
)
def test_names_that_cannot_be_used(name: str, problem: str) -> None:
    """What no file that ampd reads can be called is refused, and nothing is made."""
    with pytest.raises(ConfigError) as error:
        checked_name(name)
    hint = "say what it does: ampd new create_accounts"
    assert str(error.value) == f"the name of the migration {problem}\nhint: {hint}"


def test_where_the_file_goes(ampd: Ampd, tmp_path: Path) -> None:
    """Into the folder that is given or configured, or the working one for -; never among the packaged ones."""
    write(tmp_path / "conf", {"c.toml": '[metadata_db.migrations]\ndir = "sql"\n'})
    write(tmp_path / "numbered", {"7_a.sql": ""})
    assert seen(ampd("new", "b", "--migrations", "numbered", "--config", "conf/c.toml")) == (
        0,
        "numbered/8_b.sql\n",
        "",
    )
    assert re.fullmatch(r"conf/sql/\d{14}_b\.sql\n", ampd("new", "b", "--config", "conf/c.toml").stdout)
    variable = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__DIR": "numbered"}
    assert seen(ampd("new", "c", env=variable)) == (0, "numbered/9_c.sql\n", "")
    for here in (["--migrations", "-"], ["--migrations=-"]):
        assert re.fullmatch(r"\d{14}_b\.sql\n", ampd("new", "b", *here).stdout)
    hint = "give it with --migrations DIR (- for the working folder), or set metadata_db.migrations.dir"
    assert seen(ampd("new", "b")) == (1, "", f"error: no folder for the new migration\nhint: {hint}\n")


def test_a_folder_that_cannot_be_written_to(ampd: Ampd, tmp_path: Path) -> None:
    """The error says why; and a number that nothing can follow is one too."""
    write(tmp_path, {"file": ""})
    hint = "hint: check the path, and who may write to it\n"
    assert seen(ampd("new", "b", "--migrations", "file")) == (
        1,
        "",
        f"error: no migration can be created in file: File exists\n{hint}",
    )
    assert seen(ampd("new", "b", "--migrations", "no/where")) == (
        1,
        "",
        f"error: no migration can be created in no/where: No such file or directory\n{hint}",
    )
    write(tmp_path / "full", {f"{'9' * 18}_a.sql": ""})
    assert seen(ampd("new", "b", "--migrations", "full")) == (
        1,
        "",
        f"error: there is no version above {'9' * 18}, which has 18 digits\nhint: give the file a version\n",
    )
