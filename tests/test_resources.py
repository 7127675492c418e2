"""Migrations that a caller's own package brings along: installed, in an archive, as an editable install, by parts."""

import shutil
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.resources import files
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from ampd import ConfigError, InvalidMigration, Migration, read_migrations
from ampd.migration import checksum

FILES = {
    "shop/__init__.py": "",
    "shop/migrations/1_a.sql": "SELECT 1;",
    "shop/migrations/2_b.up.sql": "SELECT 2;",
    "shop/migrations/2_b.down.sql": "",
    "shop/migrations/old/0_x.sql": "",
    "shop/db/__init__.py": "",
    "shop/db/sql/pg/3_c.sql": "SELECT 3;",
    "shop/lost/__init__.py": "import no_such_dependency",
    "shop/empty/README.md": "",
    "shop/odd/1_a.sql": "'\\0'",
    "shop/odd/a.sql": "",
    "shop/module.py": "",
}
INCLUDE = "is the folder in the package, and are its .sql files among what is installed with it (package data)?"


def made(root: Path) -> Path:
    """Write the package `shop` below a folder."""
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.replace("\\0", "\0"))
    return root


def installed(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Install it as pip unpacks a wheel."""
    patch.syspath_prepend(made(root))


def zipped(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Put it into an archive that zipimport reads."""
    patch.syspath_prepend(shutil.make_archive(str(root / "shop"), "zip", made(root / "src")))


def editable(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Let a finder lead to it, as an editable install does."""
    folder = made(root) / "shop"

    class Finder(MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
            where = {"submodule_search_locations": [str(folder)]}
            return spec_from_file_location(name, folder / "__init__.py", **where) if name == "shop" else None  # type: ignore[arg-type]

    patch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


def without_init(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Install it as a package without `__init__.py`."""
    installed(root, patch)
    (root / "shop" / "__init__.py").unlink()


WAYS = (installed, zipped, editable, without_init)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import `shop` anew in each test, and forget it afterwards."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.mark.parametrize("install", WAYS)
def test_the_migrations_of_a_package(
    install: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a package was installed, its folder is read by the rules of any other, and called by the same name."""
    install(tmp_path, monkeypatch)
    expected = (
        Migration(1, "a", "shop/migrations/1_a.sql", "SELECT 1;", checksum(b"SELECT 1;")),
        Migration(2, "b", "shop/migrations/2_b.up.sql", "SELECT 2;", checksum(b"SELECT 2;")),
    )
    assert read_migrations(package="shop") == read_migrations(package="shop:migrations") == expected
    for package in ("shop:db/sql/pg", "shop.db:sql/pg"):
        assert [each.file for each in read_migrations(package=package)] == ["shop/db/sql/pg/3_c.sql"]


@pytest.mark.parametrize("install", WAYS)
def test_a_folder_as_importlib_gives_it(
    install: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Traversable is read as a path is, and called by what it calls itself."""
    install(tmp_path, monkeypatch)
    given = read_migrations(files("shop") / "migrations")
    assert [each.checksum for each in given] == [each.checksum for each in read_migrations(package="shop")]
    place = tmp_path / "shop.zip" / "shop" if install is zipped else tmp_path / "shop"
    assert [each.file for each in given] == [f"{place}/migrations/1_a.sql", f"{place}/migrations/2_b.up.sql"]


def test_a_package_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two distributions put into one namespace package is found in either."""
    for part in ("one", "two"):
        (tmp_path / part / "shop" / part).mkdir(parents=True)
        (tmp_path / part / "shop" / part / "1_a.sql").write_text(part)
        monkeypatch.syspath_prepend(tmp_path / part)
    assert [read_migrations(package=f"shop:{part}")[0].sql for part in ("one", "two")] == ["one", "two"]


@pytest.mark.parametrize("install", WAYS)
@pytest.mark.parametrize(
    ("package", "message", "hint"),
    [
        ("shop:gone", "shop/gone does not exist", INCLUDE),
        (
            "shop:empty",
            "shop/empty contains no file <version>_<name>.sql (passed over: README.md)",
            INCLUDE,
        ),
        (
            "shops",
            "shops/migrations cannot be read: there is no package shops",
            "is it installed in the environment that runs this?",
        ),
        (
            "shop.none.at.all:sql",
            "shop/none/at/all/sql cannot be read: there is no package shop.none.at.all",
            "is it installed in the environment that runs this?",
        ),
        (
            "shop.module",
            "shop/module/migrations cannot be read: shop.module is a module, not a package",
            "name the package that the folder lies in",
        ),
    ],
)
def test_a_package_without_migrations(
    install: Callable[[Path, pytest.MonkeyPatch], None],
    package: str,
    message: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is not there is an error that names package and folder, in the same words however it was installed."""
    install(tmp_path, monkeypatch)
    with pytest.raises(InvalidMigration) as error:
        read_migrations(package=package)
    assert str(error.value) == f"the migrations folder {message}\nhint: {hint}"
    assert error.value.file == message.split()[0]


@pytest.mark.parametrize("install", WAYS)
def test_offenders_in_a_package(
    install: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that cannot be used are named with the package."""
    install(tmp_path, monkeypatch)
    with pytest.raises(InvalidMigration) as error:
        read_migrations(package="shop:odd")
    assert error.value.message == (
        "2 faults in the files of shop/odd:\n"
        "  1_a.sql holds a NUL byte in line 1\n"
        "  a.sql is not named <version>_<name>.sql"
    )


def test_what_a_package_fails_on_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that lacks what it imports is not said to be missing itself."""
    installed(tmp_path, monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        read_migrations(package="shop.lost")


@pytest.mark.parametrize(
    "package", ["", ":", "shop:", ":sql", "shop:..", "shop:/etc", "shop:a/../b", "shop:.", ".shop", "a b", "shop:a\0"]
)
def test_what_names_no_folder_of_a_package(package: str) -> None:
    """A way out of the package, or half a name, is refused before anything is imported."""
    with pytest.raises(ConfigError) as error:
        read_migrations(package=package)
    assert str(error.value) == (
        f'package={package!r} names no folder of a package\nhint: write package="shop", or "shop:migrations"'
    )


def test_a_folder_and_a_package() -> None:
    """Only one of them can be meant."""
    with pytest.raises(ConfigError) as error:
        read_migrations("migrations", package="shop")
    assert error.value.message == "read_migrations takes a folder or package=, not both"


@pytest.mark.parametrize("given", [b"migrations", 3, ["migrations"]])
def test_what_is_no_folder(given: Any) -> None:
    """Another type is named, and so it is for `package=`."""
    with pytest.raises(TypeError) as error:
        read_migrations(given)
    assert str(error.value) == f"the migrations folder is a str, a Path or a Traversable, not {type(given).__name__}"
    with pytest.raises(TypeError) as error:
        read_migrations(package=given)
    assert str(error.value) == f"package= takes the name of a package, a str, not {type(given).__name__}"
