"""Which password is sent to which host, as libpq would send it."""

from pathlib import Path

import asyncpg
import pytest

from ampd import ConfigError, DatabaseUrl
from ampd.postgres.libpq import driver_arguments
from ampd.postgres.passwords import pool_redact
from tests.servers import Database

pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.mark.parametrize(
    ("lines", "password"),
    [
        ("h:5433:db:u:plain", "plain"),
        ("*:*:*:*:any", "any"),
        ("h:5433:db:u:a\\:b\\\\c", "a:b\\c"),
        ("h:5433:db:u:ends \r\nh:5433:db:u:second", "ends "),
        ("# h:5433:db:u:no\n\nshort:line\nh:5433:db:u\nh:1:db:u:no\nh:5433:x:u:no\nh:5433:db:v:no\ni:*:*:*:no", None),
        ("h:5433:db:u:up to here:not this", "up to here"),
        ("h:5433:db:u:half\\", "half\\"),
    ],
)
def test_the_password_file_is_read_as_libpq_does(tmp_path: Path, lines: str, password: str | None) -> None:
    """A colon and a backslash are escaped by a backslash, and a space at the end belongs to the password."""
    (file := tmp_path / "pgpass").write_bytes(lines.encode())
    file.chmod(0o600)
    url = DatabaseUrl(f"postgresql://u@h:5433/db?passfile={file}")
    assert driver_arguments(url, 1)[0].reveal().get("password") == password
    file.chmod(0o640)
    arguments, remarks = driver_arguments(url, 1)
    loose = f"password file {file} has group or world access and is ignored; chmod 0600 {file}"
    assert (arguments.reveal()["password"], remarks) == ("", (loose,))


DIFFERENT = "h:5433:db:u:one\ni:5433:db:u:two\n*:*:other:u:all\nj:*:db:u:one\nlocalhost:*:db:u:one\n"


@pytest.mark.parametrize(
    ("url", "environ", "password"),
    [
        ("postgresql://u@h:5433,i:5433/other", {}, "all"),
        ("postgresql://u@h:5433,j/db", {}, "one"),
        ("postgresql://u@k,l/db", {}, ""),  # nothing is left to the driver, which would ask for each host in turn
        ("postgresql://u@h:5433,i:5433/db", {}, None),
        ("postgresql://u@i,h/db?port=5433", {}, None),
        ("postgresql://u@h:5433,k/db", {}, None),
        ("postgresql://u@/db", {"PGHOST": "h,i", "PGPORT": "5433"}, None),
        ("postgresql:///db?user=u", {"PGHOST": "h,j", "PGPORT": "5433,1"}, "one"),
        ("postgresql:///db?user=u&host=/tmp/a,/tmp/b", {}, "one"),
        ("postgresql://u:url@h:5433,i:5433/db", {}, "url"),
        ("postgresql://u@h:5433,i:5433/db", {"PGPASSWORD": "environment"}, "environment"),
    ],
)
def test_a_password_goes_to_its_own_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, environ: dict[str, str], password: str | None
) -> None:
    """What the password file has for one of several hosts is sent to none of the others."""
    (file := tmp_path / "pgpass").write_text(DIFFERENT)
    file.chmod(0o600)
    for name, value in {"PGPASSFILE": str(file), **environ}.items():
        monkeypatch.setenv(name, value)
    if password is not None:
        assert driver_arguments(DatabaseUrl(url), 1)[0].reveal()["password"] == password
        return
    with pytest.raises(ConfigError) as error:
        driver_arguments(DatabaseUrl(url), 1)
    assert str(error.value) == (
        f"the password file {file} has not the same password for all hosts of the database URL\n"
        "hint: ampd cannot give each host its own: name one host, or set PGPASSWORD to a password that all take"
    )


@pytest.mark.anyio
async def test_a_pools_password_stays_hidden_when_its_connections_are_gone(database: Database, tmp_path: Path) -> None:
    """What a connection was made with is noted while that is there: the file that had it may be another by then."""
    (file := tmp_path / "pgpass").write_text("*:*:*:*:tiger-7")
    file.chmod(0o600)
    async with asyncpg.create_pool(database.url, passfile=file, min_size=1, max_size=1) as pool:
        redact = pool_redact(pool)
    file.write_text("*:*:*:*:lion-8")
    assert redact("neither tiger-7 nor lion-8") == "neither *** nor ***"
