"""The program on which `make types` runs two type checkers: it uses the whole public surface, and works."""

import ast
from pathlib import Path

import pytest

import ampd
from tests import typed_program
from tests.folders import write
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]


def test_it_uses_every_public_name() -> None:
    """Each name of `ampd.__all__` is in the program."""
    tree = ast.parse(Path(typed_program.__file__).read_text(encoding="utf-8"))
    names = [each for each in ast.walk(tree) if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name)]
    used = {each.attr for each in names if isinstance(each.value, ast.Name) and each.value.id == "ampd"}
    assert set(ampd.__all__) - used == set()


@pytest.mark.usefixtures("bare_environment")
async def test_it_runs(database: Database, tmp_path: Path) -> None:
    """What type checkers accept also does what it says."""
    folder = write(tmp_path / "m", {"1_t.sql": "CREATE TABLE t (id integer);\n", "2_u.sql": "CREATE TABLE u ();\n"})
    heard = await typed_program.main(database.url, folder)
    assert heard[0] == f"0 of 2, ['{folder}/1_t.sql'], ()"
    assert heard[-2:] == [ampd.__version__, "True"]
    assert "a 2" in heard
