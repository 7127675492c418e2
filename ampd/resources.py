"""Migrations out of a caller's folder or package, wherever an importer has it: on disk, in an archive.

Apart from `source`, since `importlib.resources` takes 6 ms to import, and a run by configuration needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from .errors import ConfigError, InvalidMigration
from .migration import Migration
from .source import reading, reading_from
from .sql.slices import at_once


def read_migrations(
    directory: str | Path | Traversable | None = None, *, package: str | None = None
) -> tuple[Migration, ...]:
    """Return the migrations of a folder or of a package, or those packaged with ampd, in the order of their versions.

    Files that are not `.sql`, `*.down.sql` files, subfolders and whatever begins with a dot are ignored.

    Args:
        directory: a path, or a folder as `importlib.resources.files` gives it.
        package: `shop` for the folder `migrations` of that package, which is imported; `shop:sql` for another folder
            of it. It need not be on disk: a wheel, a zip or an editable install will do.

    Raises:
        InvalidMigration: no such folder or package, or no migration in it; or files not named `<version>_<name>.sql`,
            two with one version, some that are no regular files, cannot be read, are not UTF-8 or contain a NUL byte.
            All are named at once.
        ConfigError: both a folder and a package are given, or `package` is neither NAME nor NAME:FOLDER.
        TypeError: an argument is of the wrong type.
    """
    if package is not None:
        if directory is not None:
            raise ConfigError("read_migrations takes a folder or package=, not both")
        return _of_package(package)
    if directory is None or isinstance(directory, str | Path):
        return at_once(reading(directory))
    if not isinstance(directory, Traversable):
        raise TypeError(f"the migrations folder is a str, a Path or a Traversable, not {type(directory).__name__}")
    tells = type(directory).__str__ is not object.__str__  # or it is an object at some address
    shown = str(directory).rstrip("/") if tells else directory.name
    return at_once(reading_from(directory, shown, _INCLUDE))


def _of_package(package: str) -> tuple[Migration, ...]:
    if not isinstance(package, str):
        raise TypeError(f"package= takes the name of a package, a str, not {type(package).__name__}")
    name, colon, folder = package.partition(":")
    parts = folder.split("/") if colon else ["migrations"]
    is_folder = folder.isprintable() and not {"", ".", ".."} & set(parts)
    if not (is_folder and all(part.isidentifier() for part in name.split("."))):
        raise ConfigError(
            f"package={package!r} names no folder of a package", hint='write package="shop", or "shop:migrations"'
        )
    shown = "/".join((*name.split("."), *parts))
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # what the package itself imports is not there
            raise
        raise InvalidMigration(
            f"the migrations folder {shown} cannot be read: there is no package {name}",
            file=shown,
            hint="is it installed in the environment that runs this?",
        ) from error
    if not hasattr(module, "__path__"):
        raise InvalidMigration(
            f"the migrations folder {shown} cannot be read: {name} is a module, not a package",
            file=shown,
            hint="name the package that the folder lies in",
        )
    place: Traversable = files(module)
    for part in parts:  # a package in several places takes one at a time
        place = place.joinpath(part)
    return at_once(reading_from(place, shown, _INCLUDE))


_INCLUDE = "is the folder in the package, and are its .sql files among what is installed with it (package data)?"
