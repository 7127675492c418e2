"""The package from outside: what type checkers see, what loading a name costs, what is shipped."""

import ast
import importlib
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ampd

PURE = ("config", "errors", "events", "migration", "plan", "report", "source", "sql.units", "version")


def imported_for_type_checkers() -> dict[str, str]:
    """Return each name that the package imports while type checking, and the module that it comes from."""
    tree = ast.parse(Path(ampd.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {name.name: node.module or "" for node in imports for name in node.names}


def test_type_checkers_see_what_runs() -> None:
    """The names that a type checker resolves are those of `__all__`, each the very object of the module it names."""
    seen = imported_for_type_checkers()
    assert sorted([*seen, "__version__"]) == ampd.__all__
    for name, module in seen.items():
        assert getattr(ampd, name) is getattr(importlib.import_module(f"ampd.{module}"), name)


def test_star_imports_give_the_public_names() -> None:
    """`from ampd import *` gives every public name."""
    names: dict[str, object] = {}
    exec("from ampd import *", names)
    assert set(ampd.__all__) <= names.keys()


def test_the_package_is_typed() -> None:
    """The marker that makes type checkers read the package is shipped with it, and so are the migrations."""
    assert files("ampd").joinpath("py.typed").is_file()
    assert any(entry.name.endswith(".sql") for entry in files("ampd").joinpath("migrations").iterdir())


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_load_no_driver(module: str) -> None:
    """The modules that only compute load neither the driver nor an event loop nor the command line."""
    program = f"""
import sys
import ampd.{module}
print(sorted({{"asyncpg", "anyio", "asyncio", "cyclopts", "logging", "socket", "ssl"}} & sys.modules.keys()))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_what_is_handed_out_cannot_be_changed() -> None:
    """Every public value is frozen: configuration, migrations, reports, events."""
    public: list[Any] = [getattr(ampd, name) for name in ampd.__all__]
    structs = [each for each in public if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    assert {ampd.Config, ampd.MetadataDb, ampd.Migration, ampd.Report, ampd.Status} <= set(structs)
    for each in structs:
        assert each.__struct_config__.frozen, each
