"""What `import ampd` gives, and what it leaves alone."""

import subprocess
import sys

import pytest

import ampd

CONTRACT = {
    "AmpdError",
    "ConfigError",
    "ConnectionFailed",
    "InvalidMigration",
    "LockTimeout",
    "MigrationConflict",
    "MigrationFailed",
    "MigrationInterrupted",
    "PermissionDenied",
    "TurnTimeout",
    "load_config",
    "migrate",
    "open_pool",
    "read_migrations",
    "status",
}

LEFT_ALONE = """
import logging, signal, sys, warnings
before = (list(logging.root.handlers), logging.root.level, list(warnings.filters), signal.getsignal(signal.SIGTERM))
import ampd
after = (list(logging.root.handlers), logging.root.level, list(warnings.filters), signal.getsignal(signal.SIGTERM))
loaded = sorted({"asyncpg", "anyio", "asyncio", "cyclopts", "msgspec"} & sys.modules.keys())
print(before == after, loaded, dir(ampd) == ampd.__all__)
"""


def test_names_are_sorted_and_all_there() -> None:
    """`__all__` is sorted, holds every name of the contract, and each of its names can be had."""
    assert ampd.__all__ == sorted(ampd.__all__)
    assert set(ampd.__all__) >= CONTRACT
    assert [name for name in ampd.__all__ if getattr(ampd, name, None) is None] == []


def test_everything_public_is_explained() -> None:
    """Each public class and function has a docstring of its own."""
    named = {name: getattr(ampd, name) for name in ampd.__all__ if name not in ("__version__", "Event")}
    assert [name for name, value in named.items() if callable(value) and not value.__doc__] == []


def test_unknown_names_are_attribute_errors() -> None:
    """A name that is not there is missing in the usual words."""
    with pytest.raises(AttributeError, match="module 'ampd' has no attribute 'rollback'"):
        ampd.rollback  # noqa: B018


def test_importing_changes_nothing() -> None:
    """The import configures no logging, takes no signal, and loads the driver and its kin only when they are used."""
    told = subprocess.run([sys.executable, "-c", LEFT_ALONE], capture_output=True, text=True, check=True)
    assert told.stdout == "True [] True\n"
