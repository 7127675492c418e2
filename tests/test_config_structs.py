"""Configuration put together in Python: checked as from a file, and what limits are."""

from pathlib import Path
from typing import Any

import pytest

from ampd import Config, ConfigError, DatabaseUrl, Limits, MetadataDb, Migrations
from ampd.config import ResolvedLimits, resolved_limits

SECRET = "hunter2-secret"


def test_a_url_given_as_a_text_is_hidden_too() -> None:
    """Whoever makes the section by hand need not know of the class that hides the password."""
    section = MetadataDb(url=f"postgresql://u:{SECRET}@h/db")  # type: ignore[arg-type]
    assert section == MetadataDb(url=DatabaseUrl(f"postgresql://u:{SECRET}@h/db"))
    assert SECRET not in f"{section} {section!r}"


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (MetadataDb, {"url": 5432}, "metadata_db.url: expected `str`, got `int`"),
        (MetadataDb, {"pool_size": 0}, "metadata_db.pool_size: expected `int` >= 1"),
        (MetadataDb, {"pool_size": "10"}, "metadata_db.pool_size: expected `int`, got `str`"),
        (MetadataDb, {"pool_size": True}, "metadata_db.pool_size: expected `int`, got `bool`"),
        (MetadataDb, {"min_connections": -1}, "metadata_db.min_connections: expected `int` >= 0"),
        (MetadataDb, {"min_connections": 11}, "metadata_db: min_connections (11) is above pool_size (10)"),
        (MetadataDb, {"max_lifetime_secs": -1}, "metadata_db.max_lifetime_secs: expected `float` >= 0.0"),
        (MetadataDb, {"auto_migrate": "no"}, "metadata_db.auto_migrate: expected `bool`, got `str`"),
        (MetadataDb, {"schema": ""}, "metadata_db.schema: expected `str` of length >= 1"),
        (MetadataDb, {"schema": 3}, "metadata_db.schema: expected `str`, got `int`"),
        (MetadataDb, {"migrations": "sql"}, "metadata_db.migrations: expected a table, got `str`"),
        (MetadataDb, {"migrations": Limits()}, "metadata_db.migrations: expected a table, got `Limits`"),
        (MetadataDb, {"migrations": {"dir": 3}}, "metadata_db.migrations.dir: expected `str`, got `int`"),
        (Migrations, {"dir": 3}, "metadata_db.migrations.dir: expected `str`, got `int`"),
        (Migrations, {"dir": ""}, "metadata_db.migrations.dir: expected `str` of length >= 1"),
        (Migrations, {"lock_retry_secs": -1}, "metadata_db.migrations.lock_retry_secs: expected `float` >= 0.0"),
        (Limits, {"lock_timeout_secs": -1}, "limits.lock_timeout_secs: expected `float` >= 0.0"),
        (Limits, {"lock_timeout_secs": "1"}, "limits.lock_timeout_secs: expected `float`, got `str`"),
        (Limits, {"advisory_lock_wait_secs": float("nan")}, "limits.advisory_lock_wait_secs: expected `float` >= 0.0"),
        (Limits, {"connect_wait_secs": True}, "limits.connect_wait_secs: expected `float`, got `bool`"),
        (Config, {"metadata_db": "x"}, "config.metadata_db: expected a table, got `str`"),
    ],
)
def test_values_put_together_in_python_are_checked_as_those_of_a_file(
    kind: Any, given: dict[str, object], message: str
) -> None:
    """Whoever builds a section by hand hears of a wrong value what the file's author hears, with its key path."""
    with pytest.raises(ConfigError) as error:
        kind(**given)
    key = message.partition(":")[0]
    assert str(error.value) == f"{message}\nhint: see the configuration section of the README for {key}"


def test_limits_hold_patience_and_nothing_else() -> None:
    """Each limit is a key of the configuration with the same type; what is not given stays as configured."""
    assert Limits.__struct_fields__ == ResolvedLimits.__struct_fields__
    configured = Migrations(dir=Path("sql"), lock_timeout_secs=2, lock_retry_secs=3, allow_out_of_order=True)
    assert resolved_limits(configured, None) == ResolvedLimits(lock_timeout_secs=2, lock_retry_secs=3)
    limits = Limits(lock_timeout_secs=0, connect_wait_secs=1)
    assert resolved_limits(configured, limits) == ResolvedLimits(
        lock_timeout_secs=0, lock_retry_secs=3, connect_wait_secs=1
    )


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Migrations(lock_timeout_secs=2, advisory_lock_wait_secs=0.5, dir=Path("sql")),
            "limits= takes an ampd.Limits, not Migrations: write limits=ampd.Limits(advisory_lock_wait_secs=0.5, "
            "lock_timeout_secs=2); dir and allow_out_of_order belong to the configuration: "
            "ampd.MetadataDb(migrations=ampd.Migrations(...))",
        ),
        ({"lock_timeout_secs": 1}, "limits= takes an ampd.Limits, not dict"),
        (MetadataDb(), "limits= takes an ampd.Limits, not MetadataDb"),
        (0, "limits= takes an ampd.Limits, not int"),
    ],
)
def test_what_are_no_limits(limits: Any, message: str) -> None:
    """Whatever else is given as limits is refused by name, and a Migrations with what to write in its place."""
    with pytest.raises(TypeError) as error:
        resolved_limits(Migrations(), limits)
    assert str(error.value) == message
