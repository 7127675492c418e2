"""What of libpq's parameters, variables and files is honoured, and what is refused by name."""

import socket
from urllib.parse import quote

import asyncpg
import pytest

import ampd
from ampd import ConfigError, DatabaseUrl
from ampd.postgres import libpq as libpq_module
from ampd.postgres.libpq import driver_arguments
from tests.scenes import scripts
from tests.servers import Database

pytestmark = pytest.mark.usefixtures("bare_environment")


INTEGERS = [
    ("keepalives", 2147483647),
    ("keepalives_idle", 32767),
    ("keepalives_interval", 32767),
    ("keepalives_count", 127),
    ("tcp_user_timeout", 2147483647),
    ("connect_timeout", 2147483647),
]


@pytest.mark.parametrize(("name", "largest"), INTEGERS)
@pytest.mark.parametrize("value", ["{}", "9999999999", "-9999999999", "1.5", "ten", ""])
def test_numbers_beyond_what_can_be_had(name: str, largest: int, value: str) -> None:
    """A number that the kernel or libpq would not take is an error that names the parameter and its bound."""
    value = value.format(largest + 1)
    with pytest.raises(ConfigError) as error:
        driver_arguments(DatabaseUrl(f"postgresql://h/db?{name}={value}"), 10)
    assert str(error.value) == (
        f"the database URL has {name}={value}, which is not a whole number up to {largest}\nhint: write {name}=10, say"
    )


@pytest.mark.anyio
@pytest.mark.parametrize("value", ["largest", "0", "-1"])
async def test_numbers_that_can_be_had(database: Database, value: str) -> None:
    """With each number as large as it may be, or none, there is a connection."""
    given = "&".join(f"{name}={largest if value == 'largest' else value}" for name, largest in INTEGERS)
    assert (await ampd.status(f"{database.url}?{given}", migrations=())).up_to_date


JDBC = "use sslmode=require for a connection that must be encrypted, or another sslmode"


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("ssl=false", JDBC),
        ("ssl=1", JDBC),
        ("requiressl=1", JDBC),
        ("service=amp", "write what the service stands for into the URL"),
        *(
            (
                f"{name}=app",
                f"set metadata_db.schema (or AMP_CONFIG_METADATA_DB__SCHEMA) to app, and remove {name} from the URL",
            )
            for name in ("schema", "currentSchema")
        ),
        *(
            (
                f"{name}=5",
                f"remove {name} from the URL: the pool of a service is configured under [metadata_db], as pool_size",
            )
            for name in ("connection_limit", "pool_timeout", "socket_timeout")
        ),
        *(
            (
                f"{name}=true",
                f"remove {name} from the URL: ampd prepares no statements, and works behind a pooler as it is",
            )
            for name in (
                "pgbouncer",
                "statement_cache_size",
                "prepared_statement_cache_size",
                "prepared_statement_name_func",
                "prepareThreshold",
                "async_fallback",
            )
        ),
        ("sslaccept=strict", "use sslmode=verify-full in place of strict, or sslmode=require"),
        ("sslidentity=/id.p12", "use sslcert and sslkey"),
        ("require_auth=none", "remove require_auth from the URL if you can do without it"),
        (
            "channel_binding=require",
            "remove channel_binding from the URL if you can do without it, or use channel_binding=prefer",
        ),
    ],
)
def test_parameters_that_cannot_be_honoured(query: str, hint: str) -> None:
    """A parameter that would be lost is refused by name, and no hint makes the connection less safe unasked."""
    with pytest.raises(ConfigError) as error:
        driver_arguments(DatabaseUrl(f"postgresql://h/db?{query}"), 10)
    assert str(error.value) == f"the database URL asks for {query}, which ampd cannot honour\nhint: {hint}"


def test_an_empty_file_name_is_none() -> None:
    """As to libpq, an empty parameter that names a file is as good as left out."""
    url = DatabaseUrl("postgresql://h/db?sslrootcert=&sslcert=&sslkey=&sslcrl=&sslmode=require")
    arguments, _ = driver_arguments(url, 10)
    assert DatabaseUrl(arguments.reveal()["dsn"]).parameters == {
        "sslmode": "require",
        "application_name": "ampd",
        "standard_conforming_strings": "on",
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        (
            "PGPORT",
            "abc",
            "the variable PGPORT is abc, which is not a number from 1 to 65535\nhint: correct it, or unset it",
        ),
        (
            "PGPORT",
            "1,0",
            "the variable PGPORT is 1,0, which is not a number from 1 to 65535\nhint: correct it, or unset it",
        ),
        (
            "PGTARGETSESSIONATTRS",
            "foo",
            "the variable PGTARGETSESSIONATTRS is foo, which is not one of its values\nhint: use one of any, "
            "read-write, read-only, primary, standby, prefer-standby, or unset it",
        ),
        (
            "PGSSLMODE",
            "foo",
            "h:5432/db: `sslmode` parameter must be one of: disable, allow, prefer, require, verify-ca, verify-full\n"
            "hint: correct the database URL, or what it leaves to PGSSLMODE",
        ),
    ],
)
async def test_variables_that_are_wrong(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str) -> None:
    """What is wrong with a PG* variable that the URL leaves room for is told by the variable's name."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as error:
        await ampd.status("postgresql://h/db", migrations=())
    assert str(error.value) == text


@pytest.mark.anyio
async def test_variables_that_the_url_overrides(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong variable does no harm where the URL has its own word."""
    for variable in ("PGTARGETSESSIONATTRS", "PGSSLMODE"):
        monkeypatch.setenv(variable, "foo")
    await ampd.status(f"{database.url}?target_session_attrs=any&sslmode=prefer", migrations=())


@pytest.mark.anyio
async def test_a_server_is_reached_by_every_form(database: Database) -> None:
    """Names that need every kind of quoting, by TCP and by socket, end in the right database as the right role."""
    server, odd = database.server, f"{database.name}_" + "o'd %41/@?#&=+:ä"
    name, folder, at = quote(odd, safe=""), quote(server.socket_dir, safe=""), f"{server.host}:{server.port}"
    async with database.connect() as admin:
        await admin.execute(f'CREATE DATABASE "{odd}" TEMPLATE template0')
        await admin.execute(f'CREATE ROLE "{odd}" LOGIN')
        try:
            for form in (
                f"postgres://{name}:pw@{at}/{name}",
                f"postgresql:///?dbname={name}&user={name}&host={server.host}&port={server.port}",
                f"postgresql://{name}@{folder}:{server.port}/{name}",
                f"postgresql:///{name}?host={folder}&port={server.port}&user={name}&password=a+b",
                f"postgresql://{name}@{server.host}:1,{at}/{name}",
                f"postgresql:///{name}?host={folder},{server.host}&port=1,{server.port}&user={name}",
            ):
                connection = await asyncpg.connect(DatabaseUrl(form).reveal())
                try:
                    reached = await connection.fetchrow("SELECT current_database(), current_user")
                finally:
                    await connection.close()
                assert tuple(reached) == (odd, odd), form
        finally:
            await admin.execute(f'DROP DATABASE "{odd}" WITH (FORCE)')
            await admin.execute(f'DROP ROLE "{odd}"')


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", (1, 5, 2, 3, 0)),
        ("keepalives_idle=7&keepalives_interval=4&keepalives_count=9&tcp_user_timeout=1234", (1, 7, 4, 9, 1234)),
        ("keepalives=0", (0, None, None, None, 0)),
    ],
)
async def test_a_dead_server_is_noticed_by_the_socket(
    database: Database, query: str, expected: tuple[int | None, ...]
) -> None:
    """Keepalives are on unless the URL says otherwise, with its own numbers where it gives some."""
    arguments, _ = driver_arguments(DatabaseUrl(f"{database.url}?sslmode=disable&{query}".rstrip("&")), 10)
    connection = await asyncpg.connect(**arguments.reveal())
    sock = connection._transport.get_extra_info("socket")
    tcp = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    found = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
    found += [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in tcp]
    await connection.close()
    assert [value for value, wanted in zip(found, expected, strict=True) if wanted is not None] == [
        wanted for wanted in expected if wanted is not None
    ]


@pytest.mark.parametrize(
    ("parameter", "hint"),
    [
        ("ssl_mode=require", "did you mean sslmode?"),
        ("sslMode=require", "did you mean sslmode?"),
        ("SSLROOTCERT=x", "did you mean sslrootcert?"),
        ("Search_Path=x", "did you mean search_path?"),
        ("shared_buffers=1", "remove it; or if it is a setting of the server, write it as options=-c%20NAME%3DVALUE"),
    ],
)
def test_an_unknown_parameter_is_refused_before_connecting(parameter: str, hint: str) -> None:
    """A misspelled sslmode would send the password in clear before the server could complain."""
    name = parameter.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        driver_arguments(DatabaseUrl(f"postgresql://u:geheim@h/d?{parameter}"), 1)
    assert caught.value.message == f"the database URL has the parameter {name}, which neither libpq nor ampd knows"
    assert caught.value.hint == hint


@pytest.mark.parametrize("url", ["postgresql://u:1?hunter2=x@h/d", "postgresql://u:1?hunter2=x&y=z@h/d"])
def test_a_parameter_that_may_be_a_part_of_the_password_is_not_named(url: str) -> None:
    """A password with a ? that is not encoded looks like a port and parameters."""
    with pytest.raises(ConfigError) as caught:
        driver_arguments(DatabaseUrl(url), 1)
    assert str(caught.value) == (
        "the database URL has an @ behind the ?, and a parameter that neither libpq nor ampd knows\n"
        "hint: if the password holds any of : / ? # @ % &, write those percent-encoded (%3A %2F %3F %23 %40 %25 %26)"
    )


def test_every_parameter_of_libpq_is_known() -> None:
    """The list is that of libpq's own documentation: each is honoured, or refused for what it is."""
    documented = [
        "host",
        "hostaddr",
        "port",
        "dbname",
        "user",
        "password",
        "passfile",
        "require_auth",
        "channel_binding",
        "connect_timeout",
        "client_encoding",
        "options",
        "application_name",
        "fallback_application_name",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "replication",
        "gssencmode",
        "sslmode",
        "requiressl",
        "sslnegotiation",
        "sslcompression",
        "sslcert",
        "sslkey",
        "sslkeylogfile",
        "sslpassword",
        "sslcertmode",
        "sslrootcert",
        "sslcrl",
        "sslcrldir",
        "sslsni",
        "requirepeer",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "min_protocol_version",
        "max_protocol_version",
        "krbsrvname",
        "gsslib",
        "gssdelegation",
        "scram_client_key",
        "scram_server_key",
        "service",
        "servicefile",
        "target_session_attrs",
        "load_balance_hosts",
        "oauth_issuer",
        "oauth_client_id",
        "oauth_client_secret",
        "oauth_scope",
    ]
    of_the_place = {"host", "port", "dbname", "user", "password"}
    assert set(documented) - of_the_place - libpq_module._HONOURED - libpq_module._CANNOT_HONOUR == set()


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("PGCHANNELBINDING", "require", ", or use prefer"),
        ("PGCLIENTENCODING", "LATIN1", ", or use UTF-8"),
        ("PGGSSENCMODE", "require", ", or use allow"),
        ("PGHOSTADDR", "127.0.0.2", ""),
        ("PGLOADBALANCEHOSTS", "random", ", or use disable"),
        ("PGMINPROTOCOLVERSION", "3.2", ", or use 3.0"),
        ("PGREQUIREAUTH", "scram-sha-256", ""),
        ("PGREQUIREPEER", "postgres", ""),
        ("PGREQUIRESSL", "1", ""),
        ("PGSERVICE", "amp", ""),
        ("PGSSLCERTMODE", "require", ", or use allow"),
        ("PGSSLCRLDIR", "/crl", ""),
    ],
)
def test_what_libpq_reads_and_ampd_cannot_honour_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, hint: str
) -> None:
    """Psql and ampd must not go to two places, nor one of them with less security."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        driver_arguments(DatabaseUrl("postgresql:///d"), 1)
    assert caught.value.message == f"the variable {variable} asks for {value}, which psql honours and ampd cannot"
    assert caught.value.hint == f"unset {variable} if you can do without it{hint}"


def test_a_time_to_connect_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes from the variable is named as that: the URL says nothing of it."""
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "soon")
    with pytest.raises(ConfigError) as caught:
        driver_arguments(DatabaseUrl("postgresql:///d"), 1)
    assert (
        caught.value.message == "the variable PGCONNECT_TIMEOUT is soon, which is not a whole number up to 2147483647"
    )
    assert caught.value.hint == "set PGCONNECT_TIMEOUT to 10, say, or unset it"


@pytest.mark.anyio
async def test_a_setting_of_pgoptions_that_the_server_refuses(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint names the variable as well as the URL, since the setting can come from either."""
    monkeypatch.setenv("PGOPTIONS", "-c nonsense=1")
    with pytest.raises(ConfigError) as caught:
        await ampd.status(database.url)
    assert caught.value.hint == "remove nonsense from the URL, or correct PGOPTIONS"


@pytest.mark.anyio
async def test_what_libpq_reads_is_honoured(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGOPTIONS and its like take ampd where they take psql; what the URL says itself goes before them."""
    await database.execute("CREATE SCHEMA app")
    for variable, value in {
        "PGOPTIONS": "-c search_path=app -c work_mem=5MB",
        "PGTZ": "Asia/Tokyo",
        "PGDATESTYLE": "German",
        "PGCONNECT_TIMEOUT": "7",
    }.items():
        monkeypatch.setenv(variable, value)
    arguments, _ = driver_arguments(DatabaseUrl(database.url), 1)
    assert arguments.reveal()["timeout"] == 7
    connection = await asyncpg.connect(**arguments.reveal())
    settings = "SELECT current_setting('work_mem'), current_setting('timezone'), current_setting('datestyle')"
    assert tuple(await connection.fetchrow(settings)) == ("5MB", "Asia/Tokyo", "German, DMY")
    await connection.close()
    report = await ampd.migrate(database.url, migrations=scripts("CREATE TABLE t ()"))
    assert report.schema == "app"
    psql = await asyncpg.connect(database.url, server_settings={"options": "-c search_path=app"})
    assert await psql.fetchval("SELECT to_regclass('t') = to_regclass('app.t')")
    await psql.close()
    assert (
        await ampd.status(f"{database.url}?options=-csearch_path%3Dapp", migrations=scripts("SELECT 1"))
    ).schema == "app"
