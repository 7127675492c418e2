"""Configuration: every key from either side, what wins, what is refused and in which words."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ampd import Config, ConfigError, DatabaseUrl, MetadataDb, Migrations, load_config
from ampd.config_sources import read_config, with_directory

URL = "AMP_CONFIG_METADATA_DB__URL"
FLAT = "AMP_CONFIG_METADATA_DB_URL"
SECRET = "hunter2-secret"

# Key path below metadata_db, as TOML has it, as the environment has it, the value.
KEYS: list[tuple[str, str, str, object]] = [
    ("url", '"postgres://u:p@h/db"', "postgres://u:p@h/db", DatabaseUrl("postgresql://u:p@h/db")),
    ("auto_migrate", "true", "yes", True),
    ("schema", '"amp"', "amp", "amp"),
    ("pool_size", "20", "20", 20),
    ("min_connections", "7", "7", 7),
    ("max_lifetime_secs", "60", "60", 60.0),
    ("idle_timeout_secs", "0.5", "0.5", 0.5),
    ("acquire_timeout_secs", "3", "3", 3.0),
    ("migrations.connect_wait_secs", "1", "1", 1.0),
    ("migrations.advisory_lock_wait_secs", "2.5", "2.5", 2.5),
    ("migrations.lock_timeout_secs", "0", "0", 0.0),
    ("migrations.lock_retry_secs", "1e3", "1e3", 1000.0),
    ("migrations.statement_timeout_secs", "90", "90", 90.0),
    ("migrations.dir", '"/sql"', "/sql", Path("/sql")),
    ("migrations.url", '"postgres://u@h/db"', "postgres://u@h/db", DatabaseUrl("postgresql://u@h/db")),
    ("migrations.role", '"amp_owner"', "amp_owner", "amp_owner"),
    ("migrations.table", '"queue"', "queue", "queue"),
    ("migrations.allow_out_of_order", "true", "on", True),
    (
        "migrations.lint_allow",
        '["ban-x:1_a.sql", "ban-y:2_b.sql"]',
        "ban-x:1_a.sql, ban-y:2_b.sql",
        ("ban-x:1_a.sql", "ban-y:2_b.sql"),
    ),
]
KNOWN = ", ".join(f"metadata_db.{key}" for key in ("url", "url_file", *(key for key, *_ in KEYS[1:])))


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AMP_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test writes its configuration."""
    return tmp_path / "config.toml"


def variable(key: str) -> str:
    """Return the variable that sets a key below metadata_db."""
    return f"AMP_CONFIG_METADATA_DB__{key.upper().replace('.', '__')}"


def toml(key: str, literal: str) -> str:
    """Return a document that sets one key below metadata_db."""
    return f"metadata_db.{key} = {literal}\n"


def leaves(value: msgspec.Struct, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key path and value of everything in a section."""
    for field in value.__struct_fields__:
        inner = getattr(value, field)
        if isinstance(inner, msgspec.Struct):
            yield from leaves(inner, f"{above}{field}.")
        else:
            yield f"{above}{field}", inner


def refusal(file: Path | None, environ: dict[str, str]) -> ConfigError:
    """Return the error that reading ends in."""
    with pytest.raises(ConfigError) as error:
        read_config(file, environ)
    return error.value


def test_defaults_are_those_of_the_contract() -> None:
    """With neither a file nor a variable every key has its documented default."""
    assert load_config() == Config(MetadataDb())
    assert dict(leaves(MetadataDb())) == {
        "url": None,
        "url_file": None,
        "auto_migrate": False,
        "schema": None,
        "pool_size": 10,
        "min_connections": 3,
        "max_lifetime_secs": 1800,
        "idle_timeout_secs": 600,
        "acquire_timeout_secs": 5,
        "migrations.dir": None,
        "migrations.connect_wait_secs": 30,
        "migrations.advisory_lock_wait_secs": 600,
        "migrations.lock_timeout_secs": 1,
        "migrations.lock_retry_secs": 300,
        "migrations.statement_timeout_secs": 0,
        "migrations.url": None,
        "migrations.role": None,
        "migrations.table": "ampd_schema_migrations",
        "migrations.allow_out_of_order": False,
        "migrations.lint_allow": (),
    }


def test_no_key_is_left_untested() -> None:
    """The table above names every key there is, but for the one that reads another file."""
    assert [key for key, *_ in KEYS] == [key for key, _ in leaves(MetadataDb()) if key != "url_file"]


@pytest.mark.parametrize(("key", "literal", "text", "value"), KEYS)
def test_every_key_from_either_side(file: Path, key: str, literal: str, text: str, value: object) -> None:
    """Each key is read from TOML and from its variable, into the same typed value, and changes no other key."""
    file.touch(0o600)
    file.write_text(toml(key, literal))
    from_file, remarks = read_config(file, {})
    from_environment, _ = read_config(None, {variable(key): text})
    expected = dict(leaves(MetadataDb())) | {key: value}
    if key == "pool_size":
        expected["min_connections"] = 5
    assert dict(leaves(from_file.metadata_db)) == expected
    assert from_environment == from_file
    assert type(dict(leaves(from_file.metadata_db))[key]) is type(dict(leaves(from_environment.metadata_db))[key])
    assert remarks == ()


def test_the_environment_wins_over_the_file(file: Path) -> None:
    """A variable replaces its own key and leaves the rest of the file standing, in the inner table too."""
    file.write_text(
        '[metadata_db]\npool_size = 4\nschema = "filed"\n'
        "[metadata_db.migrations]\nlock_retry_secs = 1\nadvisory_lock_wait_secs = 2\n"
    )
    config, _ = read_config(file, {variable("pool_size"): "8", variable("migrations.advisory_lock_wait_secs"): "9"})
    assert config.metadata_db == MetadataDb(
        pool_size=8, schema="filed", migrations=Migrations(lock_retry_secs=1, advisory_lock_wait_secs=9)
    )


@pytest.mark.parametrize(
    ("pool_size", "min_connections"), [(1, 1), (2, 1), (4, 1), (5, 2), (8, 2), (9, 3), (10, 3), (100, 25)]
)
def test_a_quarter_of_the_pool_is_kept_open(pool_size: int, min_connections: int) -> None:
    """`min_connections` defaults to a quarter of `pool_size`, rounded up, at least 1."""
    assert MetadataDb(pool_size=pool_size).min_connections == min_connections


@pytest.mark.parametrize("word", ["yes", "on", "true", "1", "YES", "On", "no", "off", "false", "0", "Off", "FALSE"])
def test_words_for_switches_are_for_the_environment_alone(file: Path, word: str) -> None:
    """A variable takes yes/on/true/1 and no/off/false/0 in any case; as strings in TOML they are refused."""
    expected = word.lower() in ("yes", "on", "true", "1")
    for key in ("auto_migrate", "migrations.allow_out_of_order"):
        config, _ = read_config(None, {variable(key): word})
        assert dict(leaves(config.metadata_db))[key] is expected
        file.write_text(toml(key, f'"{word}"'))
        assert refusal(file, {}).message == f"{file}: metadata_db.{key}: expected `bool`, got `str`"


@pytest.mark.parametrize(
    ("document", "environ", "database", "remarks"),
    [
        ('metadata_db_url = "postgresql:///flat"', {}, "flat", "file"),
        ("", {FLAT: "postgresql:///flat_env"}, "flat_env", "variable"),
        ('metadata_db_url = "postgresql:///flat"', {FLAT: "postgresql:///flat_env"}, "flat_env", "variable file"),
        (
            'metadata_db_url = "postgresql:///flat"\nmetadata_db.url = "postgresql:///nested"',
            {FLAT: "postgresql:///flat_env"},
            "nested",
            "variable file",
        ),
        ('metadata_db_url = "postgresql:///flat"', {URL: "postgresql:///nested_env"}, "nested_env", "file"),
        ('metadata_db.url = "postgresql:///nested"', {URL: "postgresql:///nested_env"}, "nested_env", ""),
        ('metadata_db.url = "postgresql:///nested"', {FLAT: ""}, "nested", ""),
    ],
)
def test_the_deprecated_flat_key(
    file: Path, document: str, environ: dict[str, str], database: str, remarks: str
) -> None:
    """The flat key works, below `metadata_db.url` wherever that one stands, and each use is remarked on."""
    texts = {
        "file": "metadata_db_url is deprecated: write url = … under [metadata_db]",
        "variable": "AMP_CONFIG_METADATA_DB_URL is deprecated: set AMP_CONFIG_METADATA_DB__URL",
    }
    file.write_text(document)
    config, said = read_config(file, environ)
    assert config.metadata_db.require_url().database == database
    assert [str(each) for each in said] == [texts[word] for word in remarks.split()]


def test_load_config_warns_of_the_flat_key(file: Path) -> None:
    """`load_config` tells the deprecation as a FutureWarning that points at its caller."""
    file.write_text('metadata_db_url = "postgresql:///flat"')
    with pytest.warns(FutureWarning, match="^metadata_db_url is deprecated: write url = …") as warned:
        load_config(file)
    assert [warning.filename for warning in warned] == [__file__]


def test_amp_config_names_the_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument the file is the one that AMP_CONFIG names; an argument wins, an empty AMP_CONFIG is none."""
    file.write_text(toml("pool_size", "4"))
    other = tmp_path / "other.toml"
    other.write_text(toml("pool_size", "5"))
    monkeypatch.setenv("AMP_CONFIG", str(file))
    assert [load_config().metadata_db.pool_size, load_config(other).metadata_db.pool_size] == [4, 5]
    monkeypatch.setenv("AMP_CONFIG", "")
    assert load_config().metadata_db.pool_size == 10


def test_defaults_of_a_command_stand_below_the_file(file: Path) -> None:
    """What a command defaults to holds until the file or a variable says otherwise."""
    file.write_text("")
    assert read_config(file, {}, defaults={"auto_migrate": True})[0].metadata_db.auto_migrate
    file.write_text(toml("auto_migrate", "false"))
    assert not read_config(file, {}, defaults={"auto_migrate": True})[0].metadata_db.auto_migrate
    off = {variable("auto_migrate"): "no"}
    assert not read_config(None, off, defaults={"auto_migrate": True})[0].metadata_db.auto_migrate


@pytest.mark.parametrize(
    ("document", "environ", "expected"),
    [
        ("sql", {}, "{folder}/sql"),
        ("./sql/../x", {}, "{folder}/sql/../x"),
        ("/abs", {}, "/abs"),
        (None, {variable("migrations.dir"): "sql"}, "sql"),
        ("sql", {variable("migrations.dir"): "here"}, "here"),
        ("sql", {variable("migrations.dir"): "/abs"}, "/abs"),
    ],
)
def test_relative_migration_folders(file: Path, document: str | None, environ: dict[str, str], expected: str) -> None:
    """A relative `dir` is relative to the file that names it, and to the working directory when a variable does."""
    file.write_text("" if document is None else toml("migrations.dir", f'"{document}"'))
    config, _ = read_config(file, environ)
    assert config.metadata_db.migrations.dir == Path(expected.format(folder=file.parent))


def test_relative_migration_folder_of_a_relative_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be named by a relative path itself."""
    file.write_text(toml("migrations.dir", '"sql"'))
    monkeypatch.chdir(tmp_path.parent)
    config = load_config(Path(tmp_path.name) / file.name)
    assert config.metadata_db.migrations.dir == Path(tmp_path.name) / "sql"


def test_with_directory_replaces_the_folder_alone() -> None:
    """The command line's folder replaces the configured one; none leaves it."""
    section = MetadataDb(schema="amp", migrations=Migrations(dir=Path("a"), advisory_lock_wait_secs=1))
    assert with_directory(section, None) is section
    assert with_directory(section, Path("b")) == MetadataDb(
        schema="amp", migrations=Migrations(dir=Path("b"), advisory_lock_wait_secs=1)
    )


def test_foreign_sections_are_ignored(file: Path) -> None:
    """Keys and variables of other amp programs are not looked at, however odd."""
    file.write_text(
        'data_dir = "/data"\nlog = [1, "x"]\n[writer]\nurl = 3\npool_sise = 9\n[opentelemetry]\nheaders = { a = 1 }\n'
        "[metadata_db]\npool_size = 6\n[metadata_database]\nx = 1\n"
    )
    environ = {"AMP_CONFIG_WRITER__URL": "x", "AMP_CONFIG_DATA_DIR": "y", "AMP_CONFIG": "", "METADATA_DB__URL": "z"}
    config, remarks = read_config(file, environ | {"AMP_CONFIG_METADATA_DB": "w", "AMP_CONFIG_METADATA_DBX__URL": "v"})
    assert (config.metadata_db, remarks) == (MetadataDb(pool_size=6), ())


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("pool_sise", "did you mean metadata_db.pool_size?"),
        ("poolsize", "did you mean metadata_db.pool_size?"),
        ("uri", "did you mean metadata_db.url?"),
        ("automigrate", "did you mean metadata_db.auto_migrate?"),
        ("shema", "did you mean metadata_db.schema?"),
        ("lock_timeout_secs", "did you mean metadata_db.migrations.lock_timeout_secs?"),
        ("dir", "did you mean metadata_db.migrations.dir?"),
        ("migration.dir", "did you mean metadata_db.migrations.dir?"),
        ("migrations.lock_timeout", "did you mean metadata_db.migrations.lock_timeout_secs?"),
        ("migrations.directory", "did you mean metadata_db.migrations.dir?"),
        ("migrations.uri", "did you mean metadata_db.migrations.url?"),
        ("migrations.out_of_order", "did you mean metadata_db.migrations.allow_out_of_order?"),
        ("zzzzzzzz", f"known keys: {KNOWN}"),
        ("migrations.zzzzzzzz", f"known keys: {KNOWN}"),
        ("migrations.folder", f"known keys: {KNOWN}"),
        ("database", f"known keys: {KNOWN}"),
    ],
)
def test_unknown_keys_suggest_the_nearest(file: Path, key: str, hint: str) -> None:
    """An unknown key of ours is an error, from either side, that names it, its place, and the nearest known one."""
    file.write_text(toml(key, "1"))
    error = refusal(file, {})
    named = "migration" if key == "migration.dir" else key  # the file has a table there, which is the first mistake
    assert error.message == f"{file}: unknown key metadata_db.{named}"
    assert error.file == str(file)
    if named == key:
        assert error.hint == hint
    error = refusal(None, {variable(key): "1"})
    assert str(error) == f"{variable(key)}: unknown key metadata_db.{key}\nhint: {hint}"
    assert error.file is None


def test_an_unknown_table_suggests_the_one_there_is(file: Path) -> None:
    """A table whose name is a little off is told the right one; a value in its place is not."""
    file.write_text("[metadata_db.migration]\ndir = 'sql'\n")
    assert str(refusal(file, {})) == (
        f"{file}: unknown key metadata_db.migration\nhint: did you mean metadata_db.migrations?"
    )


METADATA_DB_URL = "see the configuration section of the README for metadata_db.url"


@pytest.mark.parametrize(
    ("document", "message", "hint"),
    [
        ("metadata_db = 3", "metadata_db: expected a table, got `int`", "write it as [metadata_db]"),
        ("[[metadata_db]]", "metadata_db: expected a table, got `list`", "write it as [metadata_db]"),
        (
            toml("migrations", '"sql"'),
            "metadata_db.migrations: expected a table, got `str`",
            "write it as [metadata_db.migrations]",
        ),
        (toml("pool_size.x", "1"), "metadata_db.pool_size: expected `int`, got a table", None),
        (toml("pool_size", '"10"'), "metadata_db.pool_size: expected `int`, got `str`", None),
        (toml("pool_size", "10.0"), "metadata_db.pool_size: expected `int`, got `float`", None),
        (toml("pool_size", "true"), "metadata_db.pool_size: expected `int`, got `bool`", None),
        (toml("pool_size", "0"), "metadata_db.pool_size: expected `int` >= 1", None),
        (toml("min_connections", "-1"), "metadata_db.min_connections: expected `int` >= 0", None),
        (toml("min_connections", '"3"'), "metadata_db.min_connections: expected `int`, got `str`", None),
        (toml("auto_migrate", "1"), "metadata_db.auto_migrate: expected `bool`, got `int`", None),
        (toml("url", "5432"), "metadata_db.url: expected `str`, got `int`", None),
        ("metadata_db_url = 5", "metadata_db_url: expected `str`, got `int`", METADATA_DB_URL),
        (toml("url", "1979-05-27"), "metadata_db.url: expected `str`, got `date`", None),
        (toml("schema", '""'), "metadata_db.schema: expected `str` of length >= 1", None),
        *(
            (
                toml("schema", f'"{name}"'),
                "metadata_db.schema: the schema's name is longer than 63 bytes, or holds a NUL byte",
                "choose another name",
            )
            for name in ("x" * 64, "ä" * 32, "a\\u0000b")
        ),
        *(
            (
                toml("schema", f'"{name}"'),
                f"metadata_db.schema: the schema {name} is reserved by PostgreSQL",
                "choose another name",
            )
            for name in ("$user", "pg_catalog", "pg_amp")
        ),
        (toml("idle_timeout_secs", '"1h"'), "metadata_db.idle_timeout_secs: expected `float`, got `str`", None),
        (toml("migrations.dir", '""'), "metadata_db.migrations.dir: expected `str` of length >= 1", None),
        (toml("migrations.dir", "3"), "metadata_db.migrations.dir: expected `str`, got `int`", None),
        (
            toml("migrations.lock_timeout_secs", "-1"),
            "metadata_db.migrations.lock_timeout_secs: expected `float` >= 0.0",
            None,
        ),
        (
            toml("migrations.lock_timeout_secs", "nan"),
            "metadata_db.migrations.lock_timeout_secs: expected `float` >= 0.0",
            None,
        ),
        (
            toml("migrations.lock_timeout_secs", "inf"),
            "metadata_db.migrations.lock_timeout_secs: expected `float` <= 2147483.0",
            None,
        ),
        (toml("min_connections", "11"), "metadata_db: min_connections (11) is above pool_size (10)", None),
        (
            'metadata_db_url = "mysql://u:hunter2-secret@h/db"',
            "metadata_db_url: the database URL does not begin with postgresql:// or postgres://",
            "write it as postgresql://user:***@host:5432/database, with the password for ***",
        ),
    ],
)
def test_wrong_values_in_the_file(file: Path, document: str, message: str, hint: str | None) -> None:
    """A wrong value is an error that names the file, the key path and what was expected there."""
    file.write_text(document)
    error = refusal(file, {})
    key = message.partition(":")[0]
    assert str(error) == f"{file}: {message}\nhint: {hint or f'see the configuration section of the README for {key}'}"
    assert error.file == str(file)
    assert error.code == "config"


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("pool_size", "ten", "expected `int`, got `str`"),
        ("pool_size", "", "expected `int`, got `str`"),
        ("pool_size", "10.5", "expected `int`, got `str`"),
        ("pool_size", "0", "expected `int` >= 1"),
        ("min_connections", "null", "expected `int`, got `str`"),
        ("auto_migrate", "maybe", "expected `bool`, got `str`"),
        ("auto_migrate", "", "expected `bool`, got `str`"),
        ("schema", "", "expected `str` of length >= 1"),
        ("migrations.dir", "", "expected `str` of length >= 1"),
        ("migrations.advisory_lock_wait_secs", "1h", "expected `float`, got `str`"),
        ("migrations.advisory_lock_wait_secs", "nan", "expected `float` >= 0.0"),
        ("migrations.advisory_lock_wait_secs", "inf", "expected `float` <= 2147483.0"),
    ],
)
def test_wrong_values_in_the_environment(file: Path, key: str, text: str, problem: str) -> None:
    """A wrong value in a variable is blamed on the variable, even where the file has a right one."""
    file.write_text(toml(key, next(literal for known, literal, *_ in KEYS if known == key)))
    error = refusal(file, {variable(key): text})
    assert str(error) == (
        f"{variable(key)}: metadata_db.{key}: {problem}\n"
        f"hint: see the configuration section of the README for metadata_db.{key}"
    )
    assert error.file is None


@pytest.mark.parametrize("schema", ["x" * 63, "ä" * 31, "PG_amp", "page", "user", '"$user"'])
def test_names_that_a_schema_may_have(file: Path, schema: str) -> None:
    """What the server takes for a schema's name is taken here too, up to its 63 bytes."""
    file.write_text(toml("schema", f"'{schema}'"))
    assert load_config(file).metadata_db.schema == MetadataDb(schema=schema).schema == schema


@pytest.mark.parametrize("schema", ["$user", "pg_temp", "ä" * 32])
def test_a_schema_that_cannot_be_is_refused_without_a_file_too(schema: str) -> None:
    """A configuration made in Python is held to the same names, and a variable is blamed for its own."""
    with pytest.raises(ConfigError, match="the schema"):
        MetadataDb(schema=schema)
    assert refusal(None, {variable("schema"): schema}).message.startswith(
        f"{variable('schema')}: metadata_db.schema: the schema"
    )


def test_a_variable_below_something_that_is_no_table(file: Path) -> None:
    """A file that makes a value of the inner table is refused, not tripped over, when a variable sets a key in it."""
    file.write_text(toml("migrations", '"sql"'))
    error = refusal(file, {variable("migrations.advisory_lock_wait_secs"): "1"})
    assert error.message == f"{file}: metadata_db.migrations: expected a table, got `str`"


def test_two_keys_at_odds_are_blamed_on_the_variable(file: Path) -> None:
    """When a variable has made two keys contradict each other, that variable is named."""
    file.write_text(toml("pool_size", "4"))
    environ = {variable("min_connections"): "5", variable("schema"): "amp"}
    message = "metadata_db: min_connections (5) is above pool_size (4)"
    assert refusal(file, environ).message == f"{variable('min_connections')}: {message}"


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"x =", "not valid TOML: Invalid value (at end of document)", "fix the line it names"),
        (
            b"[metadata_db]\nurl = postgresql://u:hunter2-secret@h/db\n",
            "not valid TOML: Invalid value (at line 2, column 7)",
            "fix the line it names",
        ),
        (b"x = " + b"[" * 5000, "not valid TOML: nested too deeply", "fix the file"),
        (b"x = " + b"{a=" * 5000, "not valid TOML: nested too deeply", "fix the file"),
        (b"[metadata_db]\nschema = 'caf\xe9'\n", "not UTF-8 text (line 2)", "save it as UTF-8"),
    ],
)
def test_files_that_are_not_toml(file: Path, content: bytes, message: str, hint: str) -> None:
    """A file that is not TOML is an error with its line where there is one, and without what the line holds."""
    file.write_bytes(content)
    assert str(refusal(file, {})) == f"{file}: {message}\nhint: {hint}"


def test_a_number_that_no_number_is(file: Path) -> None:
    """A number beyond what Python reads is an error and no traceback."""
    file.write_text(f"x = {'1' * 5000}")
    assert refusal(file, {}).message.startswith(f"{file}: not valid TOML: Exceeds the limit (4300")


def test_a_byte_order_mark_does_no_harm(file: Path) -> None:
    """A file saved by a Windows editor, with BOM and CRLF, is read like any other."""
    file.write_bytes(b"\xef\xbb\xbf[metadata_db]\r\npool_size = 6\r\n")
    assert load_config(file).metadata_db.pool_size == 6


@pytest.mark.parametrize(("name", "reason"), [("none.toml", "No such file or directory"), ("", "Is a directory")])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, reason: str) -> None:
    """A file that was asked for and cannot be read is an error, never the same as no file."""
    path = tmp_path / name
    assert str(refusal(path, {URL: "postgresql:///db"})) == (
        f"{path}: the configuration file cannot be read: {reason}\n"
        "hint: check the path given by --config FILE or AMP_CONFIG"
    )


def test_a_variable_alone_needs_no_file() -> None:
    """With the URL in its variable there is no need of a file."""
    config, _ = read_config(None, {URL: "postgresql://u@h/db"})
    assert config.metadata_db.require_url() == DatabaseUrl("postgresql://u@h/db")


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{SECRET}@h/db",
        f"u:{SECRET}@h/db",
        f"postgresql://u:{SECRET}/x@h/db",
        f"postgresql://u:{SECRET}@h:port/db",
        f"postgresql://h/db?{SECRET}",
        f"postgresql://u:{SECRET}%00@h/db",
    ],
)
def test_a_wrong_url_is_never_echoed(file: Path, url: str) -> None:
    """Whatever is wrong with a URL, from whichever side it comes, the error does not repeat it."""
    file.write_text(toml("url", f'"{url}"'))
    for error in (refusal(file, {}), refusal(None, {URL: url}), refusal(None, {FLAT: url})):
        assert "metadata_db.url: the " in error.message
        assert " database URL " in error.message
        assert SECRET not in f"{error} {error!r} {error.fields()} {error.__cause__} {error.__context__}"


def test_a_configuration_prints_no_password() -> None:
    """Neither the section nor the whole configuration shows the password when printed."""
    config, _ = read_config(None, {URL: f"postgresql://u:{SECRET}@h/db?sslpassword=also-{SECRET}"})
    assert SECRET not in f"{config} {config!r} {config.metadata_db} {config.metadata_db.url!r}"
    assert "postgresql://u:***@h/db?sslpassword=***" in repr(config)


def test_values_put_together_in_python_become_what_a_file_gives() -> None:
    """A folder and a URL may be given as texts, a table as a dict: each becomes what a file would give."""
    made: Any = {"url": "postgresql://u@h/db", "migrations": {"dir": "sql", "lock_retry_secs": 1}}
    assert MetadataDb(**made) == MetadataDb(
        url=DatabaseUrl("postgresql://u@h/db"), migrations=Migrations(dir=Path("sql"), lock_retry_secs=1.0)
    )
    assert type(Migrations(lock_retry_secs=1).lock_retry_secs) is float


@pytest.mark.parametrize(
    ("mode", "url", "warned"),
    [
        (0o644, "postgresql://u:geheim@h/d", True),
        (0o602, "postgresql://u:geheim@h/d", True),
        (0o660, "postgresql://u:geheim@h/d", True),
        (0o640, "postgresql://u:geheim@h/d", False),
        (0o644, "postgresql://u@h/d", False),
    ],
)
def test_a_password_that_others_may_read_is_warned_of(tmp_path: Path, mode: int, url: str, warned: bool) -> None:
    """As of a password file by libpq; where the URL comes from a variable the file has no say in it."""
    file = tmp_path / "c.toml"
    file.write_text(f'[metadata_db]\nurl = "{url}"\n')
    file.chmod(mode)
    expected = [f"{file} holds a password, and others may read or write it: chmod 0600 {file}"] if warned else []
    assert [str(each) for each in read_config(file, {})[1]] == expected
    assert read_config(file, {"AMP_CONFIG_METADATA_DB__URL": "postgresql://u:p@h/d"})[1] == ()
