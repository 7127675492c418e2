"""What `import ampd` gives, and what it leaves alone."""

import inspect
import pydoc
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

import ampd

CONTRACT = {
    "AmpdError",
    "Limits",
    "OnEvent",
    "Result",
    "State",
    "ConfigError",
    "ConnectionFailed",
    "InvalidMigration",
    "LockTimeout",
    "MigrationConflict",
    "MigrationFailed",
    "MigrationInterrupted",
    "PermissionDenied",
    "AdvisoryLockTimeout",
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
    named = {name: getattr(ampd, name) for name in ampd.__all__ if name not in ("__version__", "OnEvent")}
    assert [name for name, value in named.items() if callable(value) and not value.__doc__] == []


def test_the_package_explains_what_there_is_to_call() -> None:
    """`help(ampd)` begins with a line for each public function."""
    functions = {name for name in ampd.__all__ if inspect.isfunction(getattr(ampd, name))}
    assert functions - set((ampd.__doc__ or "").replace(",", " ").split()) == set()


def surface() -> Iterator[tuple[str, Any]]:
    """Yield each public function and class, and each public method and property of the classes, with its name."""
    for name in ampd.__all__:
        value = getattr(ampd, name)
        if callable(value):
            yield name, value
        if inspect.isclass(value):
            for member, held in inspect.getmembers_static(value):
                function = held.fget if isinstance(held, property) else getattr(held, "__func__", held)
                shown = not member.startswith("_") or member == "__init__"
                if shown and inspect.isfunction(function) and function.__module__.startswith("ampd"):
                    yield f"{name}.{member}", function


SURFACE = dict(surface())


def test_the_surface_is_what_people_use() -> None:
    """Functions, classes, methods, properties and constructors are all looked at by the tests below."""
    some = {
        "migrate",
        "open_pool",
        "Report",
        "Report.json",
        "Report.result",
        "DatabaseUrl.reveal",
        "LockTimeout.__init__",
    }
    assert some <= SURFACE.keys()


@pytest.mark.parametrize("name", SURFACE)
def test_types_and_signatures_can_be_had(name: str) -> None:
    """Whatever looks at a public name finds its types: documentation, a debugger, dependency injection."""
    value = SURFACE[name]
    if name != "OnEvent":  # an alias
        typing.get_type_hints(value)
    if name != "OnEvent" and not (inspect.isclass(value) and issubclass(value, Exception)):
        inspect.signature(value)
        inspect.signature(value, eval_str=True)


@pytest.mark.parametrize("name", ["", *ampd.__all__])
def test_help_can_be_had(name: str) -> None:
    """`help()` of the package and of each name ends in a page."""
    assert pydoc.render_doc(f"ampd.{name}".rstrip("."))


def ampds_types(hint: Any) -> Iterator[type]:
    """Yield ampd's own classes in a type hint."""
    for inner in typing.get_args(hint):
        for each in inner if isinstance(inner, list) else [inner]:
            yield from ampds_types(each)
    if inspect.isclass(hint) and hint.__module__.startswith("ampd"):
        yield hint


def test_what_public_names_take_and_return_is_public() -> None:
    """Every type of ampd's that a public function, method or field takes or returns has a public name."""
    public = {value for value in (getattr(ampd, name) for name in ampd.__all__) if inspect.isclass(value)}
    seen = {
        (name, each)
        for name, value in SURFACE.items()
        if name != "OnEvent"
        for hint in typing.get_type_hints(value).values()
        for each in ampds_types(hint)
    }
    assert {name: each for name, each in seen if each not in public} == {}
    assert {ampd.Plan, ampd.MigrationInfo, ampd.Conflict, ampd.State, ampd.AppliedNow} <= {each for _, each in seen}


def test_results_and_states_equal_their_words() -> None:
    """What JSON calls them is what they are equal to, and what they print."""
    for kind in (ampd.Result, ampd.State, ampd.Resolution):
        for each in kind:
            assert each == each.value == str(each) == f"{each}"
            assert msgspec.json.decode(msgspec.json.encode(each)) == each.value
    report = ampd.Report("db", None, None, (), ())
    assert report.result == "up_to_date"


@pytest.mark.parametrize("call", [ampd.migrate, ampd.status, ampd.resolve])
def test_another_event_loop_than_asyncios(call: Callable[..., Any]) -> None:
    """Where no task of asyncio's runs, be it trio or no loop at all, the first step says what ampd runs on."""
    rest = (1, ampd.Resolution.APPLIED) if call is ampd.resolve else ()
    run = call("postgresql://u@127.0.0.1:1/d", *rest, migrations=())
    with pytest.raises(ampd.ConfigError) as refused:
        run.send(None)
    assert str(refused.value) == (
        "ampd runs on asyncio, as asyncpg does, and this is another event loop\n"
        "hint: use asyncio.run(...) or anyio.run(..., backend='asyncio'); from trio, a thread of its own: "
        "await trio.to_thread.run_sync(asyncio.run, ampd.migrate(...))"
    )


def test_a_pool_in_another_event_loop_than_asyncios() -> None:
    """So does the pool, before it is made."""
    configured = ampd.MetadataDb(url=ampd.DatabaseUrl("postgresql://u@127.0.0.1:1/d"))
    with pytest.raises(ampd.ConfigError, match="ampd runs on asyncio, as asyncpg does"):
        ampd.open_pool(configured).__aenter__().send(None)


def test_unknown_names_are_attribute_errors() -> None:
    """A name that is not there is missing in the usual words."""
    with pytest.raises(AttributeError, match="module 'ampd' has no attribute 'rollback'"):
        ampd.rollback  # noqa: B018


def test_importing_changes_nothing() -> None:
    """The import configures no logging, takes no signal, and loads the driver and its kin only when they are used."""
    told = subprocess.run([sys.executable, "-c", LEFT_ALONE], capture_output=True, text=True, check=True)
    assert told.stdout == "True [] True\n"
