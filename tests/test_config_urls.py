"""Which URL a configuration leads to: of the command line, the environment and the file the first that gives any."""

import os
from pathlib import Path

import pytest

from ampd import ConfigError, DatabaseUrl, MetadataDb, Migrations
from ampd.config_sources import read_config

SECRET = "hunter2-secret"
VARIABLE = "AMP_CONFIG_METADATA_DB__"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file `url` that contains one, and room for the configuration."""
    (tmp_path / "url").write_text("\n postgresql:///of_url_file \n")
    return tmp_path


def databases(folder: Path, document: str, environ: dict[str, str], url: str | None) -> tuple[str | None, str | None]:
    """Return the names of the databases of services and of migrations."""
    file = folder / "c.toml"
    file.write_text(document.format(folder=folder))
    environ = {f"{VARIABLE}{key}": value.format(folder=folder) for key, value in environ.items()}
    section = read_config(file, environ, url=url and f"postgresql:///{url}")[0].metadata_db
    return section.url.database if section.url else None, section.require_migrations_url().database


FILE = 'metadata_db.url = "postgresql:///of_file"\nmetadata_db.migrations.url = "postgresql:///direct_of_file"\n'
ENVIRONMENT = {"URL": "postgresql:///of_environment"}
DIRECT = {"MIGRATIONS__URL": "postgresql:///direct_of_environment"}


@pytest.mark.parametrize(
    ("document", "environ", "url", "expected"),
    [
        (FILE, {}, None, ("of_file", "direct_of_file")),
        (FILE, ENVIRONMENT, None, ("of_environment", "of_environment")),
        (FILE, {}, "given", ("given", "given")),
        (FILE, ENVIRONMENT | DIRECT, "given", ("given", "given")),
        (FILE, ENVIRONMENT | DIRECT, None, ("of_environment", "direct_of_environment")),
        (FILE, DIRECT, None, (None, "direct_of_environment")),
        (FILE, {"URL_FILE": "{folder}/url"}, None, ("of_url_file", "of_url_file")),
        ('metadata_db.url_file = "url"', {}, None, ("of_url_file", "of_url_file")),
        ('metadata_db.url_file = "{folder}/url"', {}, None, ("of_url_file", "of_url_file")),
        ('metadata_db.url_file = "url"', DIRECT | ENVIRONMENT, None, ("of_environment", "direct_of_environment")),
        ('metadata_db.url_file = "nowhere"', ENVIRONMENT, None, ("of_environment", "of_environment")),
        ('metadata_db.migrations.url = "postgresql:///direct_of_file"', {}, None, (None, "direct_of_file")),
        ('metadata_db_url = "postgresql:///flat"', DIRECT, None, (None, "direct_of_environment")),
        ('metadata_db_url = "postgresql:///flat"\nmetadata_db.url_file = "url"', {}, None, ("of_url_file",) * 2),
        ('metadata_db_url = "postgresql:///flat"', {}, "given", ("given", "given")),
    ],
)
def test_the_highest_source_that_gives_a_url_gives_all_of_them(
    folder: Path, document: str, environ: dict[str, str], url: str | None, expected: tuple[str | None, str | None]
) -> None:
    """Whoever names another database does not mean the file's connection for migrations."""
    assert databases(folder, document, environ, url) == expected


def refusal(file: Path | None, environ: dict[str, str], url: str | None = None) -> str:
    """Return the error that reading ends in, whole."""
    with pytest.raises(ConfigError) as error:
        read_config(file, environ, url=url)
    assert SECRET not in f"{error.value} {error.value!r} {error.value.fields()} {error.value.__context__}"
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "problem", "hint"),
    [
        (None, " cannot be read: No such file or directory", "check the path, and who may read it"),
        (b" \n", " is empty", "the file contains the URL and nothing else"),
        (b"x" * (2**20 + 1), " cannot be read: File too large", "check the path, and who may read it"),
        (
            f"postgresql://u:p@h/d\nPASSWORD={SECRET}\n".encode(),
            ": the database URL has several lines",
            "give the URL alone; a line break in a password is written %0A",
        ),
        (b"postgresql://u:p\xff@h", " is not UTF-8 text", "the file contains the URL and nothing else"),
        (
            f"mysql://u:{SECRET}@h/d".encode(),
            ": the database URL does not begin with postgresql:// or postgres://",
            "write it as postgresql://user:***@host:5432/database, with the password for ***",
        ),
    ],
)
def test_a_url_file_that_is_none(folder: Path, content: bytes | None, problem: str, hint: str) -> None:
    """The error names file and key, from either side, and never what is in it."""
    url_file, file = folder / "secret", folder / "c.toml"
    file.write_text('metadata_db.url_file = "secret"')
    if content is not None:
        url_file.write_bytes(content)
    told = f"metadata_db.url_file: {url_file}{problem}\nhint: {hint}"
    assert refusal(file, {}) == f"{file}: {told}"
    assert refusal(None, {f"{VARIABLE}URL_FILE": str(url_file)}) == f"{VARIABLE}URL_FILE: {told}"
    with pytest.raises(ConfigError) as error:
        MetadataDb(url_file=url_file)
    assert str(error.value) == told


def test_what_never_ends_is_not_read() -> None:
    """A device that somebody has named by mistake fills no memory; what is a pipe, a shell's <(…), is read."""
    hint = "check the path given by --config FILE or AMP_CONFIG"
    told = "the configuration file cannot be read: File too large"
    assert refusal(Path("/dev/zero"), {}) == f"/dev/zero: {told}\nhint: {hint}"
    with pytest.raises(ConfigError, match="/dev/zero cannot be read: File too large"):
        MetadataDb(url_file=Path("/dev/zero"))
    reader, writer = os.pipe()
    os.write(writer, b"postgresql:///of_pipe\n")
    os.close(writer)
    assert MetadataDb(url_file=Path(f"/dev/fd/{reader}")).url == DatabaseUrl("postgresql:///of_pipe")
    os.close(reader)


def test_a_url_and_a_file_with_one_from_the_same_source(folder: Path) -> None:
    """Which of them is meant nobody can tell."""
    file = folder / "c.toml"
    file.write_text('metadata_db.url_file = "url"\nmetadata_db.url = "postgresql:///d"')
    both = "metadata_db.url and metadata_db.url_file are both given\nhint: leave one out"
    assert refusal(file, {}) == f"{file}: {both}"
    environ = {f"{VARIABLE}URL": "postgresql:///d", f"{VARIABLE}URL_FILE": "url"}
    assert refusal(file, environ) == f"{VARIABLE}URL, {VARIABLE}URL_FILE: {both}"


def test_a_url_of_the_command_line_is_blamed_on_its_option() -> None:
    """An error with the URL that was given says --url, whatever else is configured."""
    port = "the port in the database URL is not a number from 1 to 65535"
    assert refusal(None, {f"{VARIABLE}URL": "mysql://x"}, f"postgresql://u:{SECRET}@h:x/d").startswith(f"--url: {port}")


ALONE = "metadata_db.migrations.url is for migrations alone, and where it comes from no URL is given: "
WAYS = (
    "give --url URL, or set AMP_CONFIG_METADATA_DB__URL, or metadata_db.url in a file given by --config FILE "
    "(or AMP_CONFIG)"
)


@pytest.mark.parametrize(
    ("section", "other", "hint"),
    [
        (MetadataDb(), None, WAYS),
        (MetadataDb(), "", WAYS),
        (MetadataDb(), "x", f'{WAYS}; DATABASE_URL is set: AMP_CONFIG_METADATA_DB__URL="$DATABASE_URL" takes it'),
        (MetadataDb(migrations=Migrations(url=DatabaseUrl("postgresql:///d"))), None, ALONE + WAYS),
    ],
)
def test_without_any_url_the_message_names_every_way(
    monkeypatch: pytest.MonkeyPatch, section: MetadataDb, other: str | None, hint: str
) -> None:
    """Whoever needs the URL and finds none is told how to give one, and of the variable that other tools read."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    if other is not None:
        monkeypatch.setenv("DATABASE_URL", other)
    with pytest.raises(ConfigError) as error:
        section.require_url()
    assert str(error.value) == f"no database URL is configured\nhint: {hint}"


@pytest.mark.parametrize(
    ("document", "mode", "warned"),
    [
        ('metadata_db.migrations.url = "postgresql://u:p@h/d"', 0o644, True),
        ('metadata_db.migrations.url = "postgresql://u:p@h/d"', 0o600, False),
        ('metadata_db.url_file = "secret"', 0o644, False),
    ],
)
def test_a_password_in_the_file_that_others_may_read(folder: Path, document: str, mode: int, warned: bool) -> None:
    """The URL of migrations is warned of as the other one; one in a file of its own is not in this one."""
    file = folder / "c.toml"
    (folder / "secret").write_text("postgresql://u:p@h/d")
    file.write_text(document)
    file.chmod(mode)
    assert bool(read_config(file, {})[1]) is warned


def test_a_url_that_was_read_from_a_file_stays_as_it_was_read(folder: Path) -> None:
    """A section with another folder, say, does not read it again: the secret may be gone by then."""
    from ampd.config_sources import with_directory

    section = MetadataDb(url_file=folder / "url")
    (folder / "url").unlink()
    assert with_directory(section, folder).require_url() == DatabaseUrl("postgresql:///of_url_file")
