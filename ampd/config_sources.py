"""Where a configuration comes from: the command line's URL, the environment and a TOML file, into one section."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_IROTH, S_IWGRP, S_IWOTH
from typing import Any, get_origin, get_type_hints

import msgspec

from .config import PREFIX, Config, MetadataDb, Migrations, read_small
from .errors import ConfigError
from .redaction import discreet

FLAT_URL = "metadata_db_url"
URL_OPTION = "--url"
_FLAT_VARIABLE = "AMP_CONFIG_METADATA_DB_URL"


def load_config(path: str | Path | None = None) -> Config:
    """Return the configuration from a TOML file (default: the one `AMP_CONFIG` names, else none) and the environment.

    Raises:
        ConfigError: names the file or variable, the key path, and what was expected there.
    """
    import warnings

    config, found = read_config(path, os.environ)
    for warning in found:
        warnings.warn(warning, stacklevel=2)
    return config


_URLS: tuple[tuple[str, ...], ...] = (("url",), ("url_file",), ("migrations", "url"))


@discreet
def read_config(
    path: str | Path | None,
    environ: Mapping[str, str],
    *,
    url: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Config, tuple[Warning, ...]]:
    """Return the configuration and warnings; the file wins over `defaults` for `[metadata_db]`.

    Of the command line's `url`, the environment and the file, the first that gives any URL gives all of them: whoever
    names another database does not mean the file's connection for migrations.
    """
    path = path or environ.get("AMP_CONFIG") or None
    file = Path(path) if path else None
    document = _read_toml(file) if file else {}
    warnings: list[Warning] = []
    variables: dict[tuple[str, ...], str] = {}

    section = dict(defaults or {}) | _table(document, "metadata_db", "metadata_db", file)
    section["migrations"] = _table(section, "migrations", "metadata_db.migrations", file)
    if isinstance(relative := section.get("url_file"), str) and file and relative:
        section["url_file"] = file.parent / relative
    given = list(_overlay(environ))
    if url is not None:
        given = [each for each in given if each[1] not in _URLS] + [(URL_OPTION, ("url",), url)]
    from_file = not any(keys in _URLS for _, keys, _ in given)
    for keys in () if from_file else _URLS:
        _at(section, keys).pop(keys[-1], None)
    is_flat = from_file and not any(keys[-1] in _at(section, keys) for keys in _URLS)
    if value := environ.get(_FLAT_VARIABLE):
        warnings.append(FutureWarning(f"{_FLAT_VARIABLE} is deprecated: set {PREFIX}METADATA_DB__URL"))
        if is_flat:
            section["url"], variables["url",] = value, _FLAT_VARIABLE
    if FLAT_URL in document:
        warnings.append(FutureWarning(f"{FLAT_URL} is deprecated: write url = … under [metadata_db]"))
    flat = is_flat and FLAT_URL in document and "url" not in section
    if flat:
        section["url"] = document[FLAT_URL]
    for variable, keys, value in given:
        _at(section, keys)[keys[-1]] = value
        variables[keys] = variable
    if "url" in section and "url_file" in section:
        where = ", ".join(variables[keys] for keys in _URLS[:2] if keys in variables) or file
        problem = "metadata_db.url and metadata_db.url_file are both given"
        raise ConfigError(f"{where}: {problem}", file=str(file) if file and from_file else None, hint="leave one out")

    metadata_db = _convert(section, file, variables, flat=flat)
    # Not of a url_file: Kubernetes and Docker mount secrets so that others may read them.
    urls = (None if metadata_db.url_file or variables.get(("url",)) else metadata_db.url, metadata_db.migrations.url)
    if file and from_file and any(each and each.password for each in urls) and _is_open(file):
        warnings.append(UserWarning(f"{file} holds a password, and others may read or write it: chmod 0600 {file}"))
    directory = metadata_db.migrations.dir
    if directory is not None and file is not None and ("migrations", "dir") not in variables:
        metadata_db = with_directory(metadata_db, file.parent / directory)
    return Config(metadata_db), tuple(warnings)


def _at(section: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the table that a key is in."""
    table: dict[str, Any] = section if len(keys) == 1 else section[keys[0]]
    return table


def _is_open(file: Path) -> bool:
    """Return whether others may read a file or write to it; that a group may read it can be meant so."""
    return bool(file.stat().st_mode & (S_IROTH | S_IWOTH | S_IWGRP))


def with_directory(metadata_db: MetadataDb, directory: Path | None) -> MetadataDb:
    """Return the section with another migrations folder; the same section for None."""
    if directory is None:
        return metadata_db
    migrations = msgspec.structs.replace(metadata_db.migrations, dir=directory)
    return msgspec.structs.replace(metadata_db, migrations=migrations)


def _read_toml(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        content = read_small(file)
        return tomllib.loads(content.decode("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}", file=str(file), hint="fix the line it names") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: not UTF-8 text (line {line})", file=str(file), hint="save it as UTF-8") from None
    except (RecursionError, ValueError) as error:  # what tomllib lets through: many brackets, and very long numbers
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{file}: not valid TOML: {reason}", file=str(file), hint="fix the file") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: the configuration file cannot be read: {error.strerror or error}",
            file=str(file),
            hint="check the path given by --config FILE or AMP_CONFIG",
        ) from error


def _table(parent: Mapping[str, Any], key: str, path: str, file: Path | None) -> dict[str, Any]:
    table = parent.get(key, {})
    if not isinstance(table, dict):
        problem = f"{file}: {path}: expected a table, got `{type(table).__name__}`"
        raise ConfigError(problem, file=str(file), hint=f"write it as [{path}]")
    return dict(table)


def _overlay(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield variable, key path and value for each variable that sets a key of ours."""
    prefix = f"{PREFIX}METADATA_DB__"
    for variable in sorted(environ):
        if variable.startswith(prefix):
            keys = tuple(variable.removeprefix(prefix).lower().split("__"))
            _check_known(keys, variable, None)
            yield variable, keys, _lax(keys, environ[variable])


_TABLES: dict[tuple[str, ...], type[msgspec.Struct]] = {(): MetadataDb, ("migrations",): Migrations}
_SWITCH = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}


def _lax(keys: tuple[str, ...], value: str) -> object:
    """Return a variable's text as the value TOML would have given: there are only strings in an environment."""
    expected = get_type_hints(_TABLES[keys[:-1]])[keys[-1]]
    if expected is bool:
        return _SWITCH.get(value.lower(), value)
    if get_origin(expected) is tuple:
        return [each.strip() for each in value.split(",") if each.strip()]
    try:
        return float(value) if expected is float else int(value) if "int" in str(expected) else value
    except ValueError:
        return value


def _check_known(keys: tuple[str, ...], where: str, file: Path | None, *, is_table: bool = False) -> None:
    table = _TABLES.get(keys[:-1])
    known = () if table is None else table.__struct_fields__
    if keys[-1] in known and keys not in _TABLES:
        return
    every = [".".join((*above, field)) for above, struct in _TABLES.items() for field in struct.__struct_fields__]
    raise ConfigError(
        f"{where}: unknown key metadata_db.{'.'.join(keys)}",
        file=str(file) if file else None,
        hint=_nearest(".".join(keys), [name for name in every if is_table or name != "migrations"]),
    )


def _nearest(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    table, _, own = key.rpartition(".")
    homes = {name.rpartition(".")[2]: name for name in reversed(known)}
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == table}
    if own in homes:
        return f"did you mean metadata_db.{homes[own]}?"
    for names in (beside, homes):  # without their table, which would make them all alike
        begins_it = [name for name in names if own.startswith(name)]  # as dir begins directory
        if close := get_close_matches(own, names, n=1, cutoff=0.65) or begins_it:
            return f"did you mean metadata_db.{names[close[0]]}?"
    return f"known keys: {', '.join(f'metadata_db.{name}' for name in known)}"


def _convert(
    section: dict[str, Any], file: Path | None, variables: Mapping[tuple[str, ...], str], *, flat: bool
) -> MetadataDb:
    for above, table in (((), section), (("migrations",), section["migrations"])):
        for key, value in table.items():
            if (*above, key) not in _TABLES:
                _check_known((*above, key), str(file), file, is_table=isinstance(value, dict))
    try:
        return MetadataDb(**section | {"migrations": Migrations(**section["migrations"])})
    except ConfigError as error:
        key, _, problem = error.message.partition(": ")
        hint = error.hint
    keys = tuple(key.split(".")[1:])
    # A problem between two keys has no path but names them.
    to_blame = [variable for path, variable in variables.items() if path == keys or (not keys and path[-1] in problem)]
    if flat and keys == ("url",) and not to_blame:
        key = FLAT_URL
    if to_blame == [URL_OPTION]:
        raise ConfigError(f"{URL_OPTION}: {problem}", hint=hint)
    raise ConfigError(
        f"{', '.join(to_blame) or file}: {key}: {problem}",
        hint=hint,
        file=str(file) if file and not to_blame else None,
    )
