"""Commands in messages, as they are to be pasted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ampd.cli import messages
from ampd.cli.app import Where, configure
from ampd.cli.messages import told
from ampd.errors import ConfigError


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    messages.remember_options([])


URL = "postgresql://amp:secret@h:5432/my%20db?sslmode=disable&sslpassword=s3"
SHOWN = "postgresql://amp@h:5432/my%20db?sslmode=disable"


@pytest.mark.parametrize(
    ("config", "url", "migrations", "options"),
    [
        (None, None, None, ""),
        (None, None, Path("db/m"), " --migrations db/m"),
        (None, None, Path("my files"), " --migrations 'my files'"),
        (None, "postgresql://h/db", None, " --url postgresql://h/db"),
        (Path("c.toml"), URL, Path("m"), f" --config c.toml --url '{SHOWN}' --migrations m"),
        (None, "nonsense", Path("m"), " --migrations m"),
    ],
    ids=["none", "folder", "quoted", "url", "all", "no url"],
)
def test_a_command_has_the_options_of_the_command_line(
    config: Path | None, url: str | None, migrations: Path | None, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was given is given again, quoted for a shell, but for a password; other commands stay as they are."""
    monkeypatch.setattr("ampd.config_sources.read_config", nothing)
    with pytest.raises(ConfigError, match="stop"):
        configure(Where(config, url), migrations)
    text = "run `ampd resolve 3 --applied`, `A_B=true ampd migrate` or `ampd lint`; `git log -- x`"
    assert told(text, None) == (
        f"run `ampd resolve 3 --applied{options}`, `A_B=true ampd migrate{options}` or `ampd lint`; `git log -- x`"
    )


def nothing(*_: object, **__: object) -> None:
    """Stand in for what reads the configuration, which comes after."""
    raise ConfigError("stop")


def test_an_option_is_given_once() -> None:
    """A command that a message gives with an option of its own keeps it."""
    messages.remember_options(["--migrations m"])
    assert told("`ampd baseline 3 --migrations DIR`", None) == "`ampd baseline 3 --migrations DIR`"
