"""The database URL: what it means, to us, to libpq and to the driver; and that it never shows its password."""

import ctypes
import inspect
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pytest
from asyncpg import connect_utils
from hypothesis import assume, example, given
from hypothesis import strategies as st

import ampd
from ampd import ConfigError, DatabaseUrl
from ampd.redaction import Hidden
from tests.repetition import examples
from tests.scenes import scripts
from tests.servers import Database, Server

ENCODE = "if the password holds any of : / ? # @ % &, write those percent-encoded (%3A %2F %3F %23 %40 %25 %26)"
NOT_A_PORT = "the port in the database URL is not a number from 1 to 65535"
Host = tuple[str, int | None]


pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.mark.parametrize(
    ("url", "user", "password", "hosts", "database", "parameters"),
    [
        ("postgresql://u:p@h:5433/db", "u", "p", [("h", 5433)], "db", {}),
        ("postgres://u:p@h/db", "u", "p", [("h", None)], "db", {}),
        (" postgresql://u@h/db\n", "u", None, [("h", None)], "db", {}),
        ("postgresql://", None, None, [], None, {}),
        ("postgresql:///db", None, None, [], "db", {}),
        ("postgresql://h", None, None, [("h", None)], None, {}),
        ("postgresql://:5433/db", None, None, [("", 5433)], "db", {}),
        ("postgresql:///db?port=5433", None, None, [("", 5433)], "db", {}),
        ("postgresql://u:@h/", "u", None, [("h", None)], None, {}),
        ("postgresql://:p@h/", None, "p", [("h", None)], None, {}),
        ("postgresql://u%40t:p%3A%2F%3F%23%40%25@h/d%2Fb", "u@t", "p:/?#@%", [("h", None)], "d/b", {}),
        ("postgresql://me@tenant:p@ss:w#rd@h/db", "me@tenant", "p@ss:w#rd", [("h", None)], "db", {}),
        ("postgresql://u:50%off+%zz@h/db", "u", "50%off+%zz", [("h", None)], "db", {}),
        ("postgresql://u:pä%C3%A4@h/db", "u", "pää", [("h", None)], "db", {}),
        ("postgresql:///?user=u&password=a+b/c==&dbname=db&host=h", "u", "a+b/c==", [("h", None)], "db", {}),
        ("postgresql://u:p@h/db?user=v&password=q&dbname=x&host=i&port=1", "v", "q", [("i", 1)], "x", {}),
        ("postgresql://h/db?pass%77ord=p", None, "p", [("h", None)], "db", {}),
        ("postgresql://h/db?sslpassword=p&a=1&a=2&", None, None, [("h", None)], "db", {"sslpassword": "p", "a": "2"}),
        ("postgresql://h/db?options=-c%20a%3Db", None, None, [("h", None)], "db", {"options": "-c a=b"}),
        ("postgresql://h/db?ssl=true", None, None, [("h", None)], "db", {"sslmode": "require"}),
        ("postgresql://h/db?ssl=true&sslmode=verify-ca", None, None, [("h", None)], "db", {"sslmode": "verify-ca"}),
        ("postgresql://a:1,b:2,c/db", None, None, [("a", 1), ("b", 2), ("c", 5432)], "db", {}),
        ("postgresql:///db?host=a,b&port=1,2", None, None, [("a", 1), ("b", 2)], "db", {}),
        ("postgresql:///db?host=a,b&port=1", None, None, [("a", 1), ("b", 1)], "db", {}),
        ("postgresql:///db?host=a,b&port=,2", None, None, [("a", 5432), ("b", 2)], "db", {}),
        ("postgresql:///db?host=/run/pg", None, None, [("/run/pg", None)], "db", {}),
        ("postgresql:///db?host=/run/p%20g&port=1", None, None, [("/run/p g", 1)], "db", {}),
        ("postgresql://%2Frun%2Fp%3Ag:1/db", None, None, [("/run/p:g", 1)], "db", {}),
        ("postgresql:///db?host=/run/pg,h&port=,1", None, None, [("/run/pg", 5432), ("h", 1)], "db", {}),
        ("postgresql://[::1]/db", None, None, [("::1", None)], "db", {}),
        ("postgresql://u:p@[::1]:5433/db", "u", "p", [("::1", 5433)], "db", {}),
        ("postgresql://[fe80::1%25eth0]/db", None, None, [("fe80::1%eth0", None)], "db", {}),
        ("postgresql://[::1]:1,h:2/db", None, None, [("::1", 1), ("h", 2)], "db", {}),
        ("postgresql:///db?host=::1", None, None, [("::1", None)], "db", {}),
        ("postgresql://u@:5433/db?host=/run/pg", "u", None, [("/run/pg", 5433)], "db", {}),
        ("postgresql://a:5433/db?host=h", None, None, [("h", 5433)], "db", {}),
        ("postgresql://a:1,b:2/db?host=/run/pg,h", None, None, [("/run/pg", 1), ("h", 2)], "db", {}),
        ("postgresql://a,b/db?host=h", None, None, [("h", None)], "db", {}),
        ("postgresql://h:1/db?port=5433", None, None, [("h", 5433)], "db", {}),
        ("postgresql://a:1,b/db?port=2", None, None, [("a", 2), ("b", 2)], "db", {}),
    ],
)
def test_what_a_url_means(
    url: str,
    user: str | None,
    password: str | None,
    hosts: list[Host],
    database: str | None,
    parameters: dict[str, str],
) -> None:
    """Every form that libpq takes is understood, and stays the same when rendered and read again."""
    read = DatabaseUrl(url)
    for each in (read, DatabaseUrl(read.reveal())):
        assert (each.user, each.password, list(each.hosts), each.database) == (user, password, hosts, database)
        assert each.parameters == parameters
    assert DatabaseUrl(read.reveal()) == read
    assert hash(DatabaseUrl(read.reveal())) == hash(read)


@pytest.mark.parametrize(
    ("url", "message", "hint"),
    [
        *(
            (
                url,
                "the database URL does not begin with postgresql:// or postgres://",
                "write it as postgresql://user:***@host:5432/database, with the password for ***",
            )
            for url in ("h/db", "host=h password=hunter2", "mysql://u:hunter2@h/db", "POSTGRESQL:/u:hunter2@h/db")
        ),
        *(
            (
                url,
                "the database URL is empty",
                "check that the variable that it comes from is set; "
                "write it as postgresql://user:***@host:5432/database, with the password for ***",
            )
            for url in ("", " \n")
        ),
        ("postgresql://u:hunter2/x@h/db", "the database URL has an @ after the host", ENCODE),
        ("postgresql://u:hunter2/x", NOT_A_PORT, ENCODE),
        ("postgresql://u:8080/hunter2@h/db", "the database URL has an @ after the host", ENCODE),
        ("postgresql://u:80?hunter2@h/db", "the database URL has a parameter without a value after the ?", ENCODE),
        ("postgresql://h:0/db", NOT_A_PORT, ENCODE),
        ("postgresql://h:65536/db", NOT_A_PORT, ENCODE),
        ("postgresql://h:-1/db", NOT_A_PORT, ENCODE),
        ("postgresql://h:٣/db", NOT_A_PORT, ENCODE),
        ("postgresql:///db?port=hunter2", NOT_A_PORT, ENCODE),
        ("postgresql://::1/db", NOT_A_PORT, ENCODE),
        ("postgresql://[::1/db", "the database URL has an IPv6 address without its closing bracket", ENCODE),
        ("postgresql://[::1]5432/db", "the database URL has an IPv6 address without its closing bracket", ENCODE),
        ("postgresql://a,,b/db", "the database URL has a list of hosts with an empty place in it", "name each of them"),
        ("postgresql:///db?host=a,b,c&port=1,2", "the database URL gives 2 ports for 3 hosts", "give each its own"),
        ("postgresql://a:1,b:1/db?host=h", "the database URL gives 2 ports for 1 hosts", "give each its own"),
        *(
            (url, "the database URL has several lines", "give the URL alone; a line break in a password is written %0A")
            for url in ("postgresql://u:p@h/d\nPASSWORD=hunter2", "postgresql://u:p\rhunter2@h", "\u2028hunter2\u2028h")
        ),
        ("postgresql://h/d%00b", "the database URL holds a NUL byte, or bytes that are not UTF-8", ENCODE),
        ("postgresql://u:hunter2%E4@h/", "the database URL holds a NUL byte, or bytes that are not UTF-8", ENCODE),
    ],
)
def test_what_is_not_a_url(url: str, message: str, hint: str) -> None:
    """Anything else is an error that says what is the matter and shows nothing of the text."""
    with pytest.raises(ConfigError) as error:
        DatabaseUrl(url)
    assert (error.value.message, error.value.hint) == (message, hint)
    assert "hunter2" not in f"{error.value} {error.value.__cause__} {error.value.__context__}"


@pytest.mark.parametrize(
    ("url", "shown", "label"),
    [
        ("postgres://u:secret@h/db", "postgresql://u:***@h/db", "h:5432/db"),
        ("postgresql://h/db?password=secret", "postgresql://:***@h/db", "h:5432/db"),
        ("postgresql://h/db?PASSWORD=secret&a=b", "postgresql://h/db?PASSWORD=***&a=b", "h:5432/db"),
        ("postgresql://h/db?sslpassword=secret", "postgresql://h/db?sslpassword=***", "h:5432/db"),
        ("postgresql://u:secret@a:1,b/db", "postgresql://u:***@a:1,b:5432/db", "a:1,b:5432/db"),
        ("postgresql://u:secret@[::1]:1/db", "postgresql://u:***@[::1]:1/db", "[::1]:1/db"),
        ("postgresql:///db?host=/run/pg&user=u", "postgresql://u@/db?host=/run/pg", "/run/pg:5432/db"),
        ("postgresql:///db?port=1", "postgresql:///db?port=1", "localhost:1/db"),
        ("postgresql://u@h", "postgresql://u@h", "h:5432/u"),
        ("postgresql://", "postgresql://", "localhost:5432/"),
    ],
)
def test_what_a_url_shows(url: str, shown: str, label: str) -> None:
    """Printed, a URL is whole but for its secrets; its label is host, port and database."""
    read = DatabaseUrl(url)
    assert (str(read), repr(read), read.label) == (shown, f"DatabaseUrl({shown!r})", label)


def test_the_label_knows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the URL leaves to the PG* variables is labelled as those say."""
    for name, value in {"PGHOST": "db.example", "PGPORT": "6432", "PGUSER": "amp"}.items():
        monkeypatch.setenv(name, value)
    assert DatabaseUrl("postgresql://").label == "db.example:6432/amp"
    assert DatabaseUrl("postgresql://u@h:1").label == "h:1/u"
    monkeypatch.setenv("PGDATABASE", "metadata")
    assert DatabaseUrl("postgresql://u@h").label == "h:6432/metadata"
    monkeypatch.setenv("PGHOST", "a,b")
    assert DatabaseUrl("postgresql://").label == "a:6432,b:6432/metadata"
    monkeypatch.setenv("PGPORT", "1,2")
    assert DatabaseUrl("postgresql://").label == "a:1,b:2/metadata"


def test_other_parameters_leave_the_rest_alone() -> None:
    """`with_parameters` replaces the parameters of a copy, and nothing else."""
    url = DatabaseUrl("postgresql://u:p@h/db?a=1")
    changed = url.with_parameters({"b": "2"})
    assert (changed.reveal(), url.reveal()) == ("postgresql://u:p@h/db?b=2", "postgresql://u:p@h/db?a=1")
    assert changed != url
    assert url != "postgresql://u:p@h/db?a=1"


def test_redaction_takes_the_longer_secret_first() -> None:
    """Where one secret is a part of another, no end of the longer one is left."""
    url = DatabaseUrl("postgresql://u:pass%2F1@h/db?sslpassword=pass%2F12345")
    assert url.redact("a pass/1, b pass/12345, c pass%2F1, d pass%2F12345, e other") == (
        "a ***, b ***, c ***, d ***, e other"
    )


@pytest.mark.parametrize(
    ("password", "shown"),
    [
        ("e", 'password "***" failed: relation "e_mail", host ***.example'),
        ("e_m", 'password "e" failed: relation "e_mail", host e.example'),
        ("pass", '***word "e" failed: relation "e_mail", host e.example'),
    ],
)
def test_a_very_short_password_is_hidden_as_a_word_alone(password: str, shown: str) -> None:
    """What is shorter than four characters is part of too many words to be taken out of them."""
    text = 'password "e" failed: relation "e_mail", host e.example'
    assert DatabaseUrl(f"postgresql://u:{password}@h/db").redact(text) == shown


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
SECRETS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=4, max_size=16)
HOST_NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,10}", fullmatch=True)
ADDRESSES = st.sampled_from(["127.0.0.1", "::1", "2001:db8::7", "fe80::1%eth0"])
SOCKETS = st.text(st.characters(codec="ascii", exclude_characters="\0,"), max_size=8).map(lambda text: f"/{text}x")
HOSTS = st.lists(st.tuples(HOST_NAMES | ADDRESSES | SOCKETS, st.none() | st.integers(1, 65535)), min_size=1, max_size=3)


def everything_encoded(text: str) -> str:
    """Return every byte percent-encoded, whether it needs to be or not."""
    return "".join(f"%{byte:02x}" for byte in text.encode())


def sparingly_encoded(text: str) -> str:
    """Return the text as a person writes it: encoded is what ends a part of the URL, or may begin a placeholder."""
    ends = " %:/?#@&=,+[]${<"
    return "".join(quote(each, safe="") if each in ends or not each.isprintable() else each for each in text)


ENCODERS: list[Callable[[str], str]] = [lambda text: quote(text, safe=""), everything_encoded, sparingly_encoded]


@st.composite
def urls(draw: st.DrawFn, secrets: st.SearchStrategy[str] = SECRETS) -> tuple[str, dict[str, Any]]:
    """Return a URL and what it was made from; where one host of several has a port, the others have the usual one."""
    encode = draw(st.sampled_from(ENCODERS))
    user, password, database = draw(NAMES), draw(secrets), draw(NAMES)
    hosts = draw(HOSTS)
    credentials = f"{encode(user)}:{encode(password)}@"
    query = []
    if draw(st.booleans()):
        credentials = f"{encode(user)}@"
        query.append(f"password={encode(password)}")
    if draw(st.booleans()) or any(host.startswith("/") for host, _ in hosts):
        before = ""
        query.append(f"host={encode(','.join(host for host, _ in hosts))}")
        if any(port for _, port in hosts):
            query.append(f"port={','.join(str(port or '') for _, port in hosts)}")
    else:
        before = ",".join(
            (f"[{encode(host)}]" if ":" in host else encode(host)) + (f":{port}" if port else "")
            for host, port in hosts
        )
    usual = 5432 if any(port for _, port in hosts) else None
    meant = tuple((host, port or usual) for host, port in hosts)
    made = {"user": user, "password": password, "database": database, "hosts": meant}
    query.append(f"application_name={encode(user)}")
    return f"postgresql://{credentials}{before}/{encode(database)}?{'&'.join(draw(st.permutations(query)))}", made


def as_asyncpg_reads(dsn: str) -> tuple[list[Any], Any]:
    """Return addresses and parameters as asyncpg takes them from a URL."""
    parse = connect_utils._parse_connect_dsn_and_args
    nothing_else = dict.fromkeys(inspect.signature(parse).parameters)
    addresses, parameters = parse(**(nothing_else | {"dsn": dsn, "ssl": False}))
    return addresses, parameters


@given(urls())
@examples(80)
def test_what_was_meant_is_what_the_driver_gets(made: tuple[str, dict[str, Any]]) -> None:
    """From any way to write a URL down asyncpg gets the user, password, hosts, database and setting that were meant."""
    url, meant = made
    read = DatabaseUrl(url)
    assert (read.user, read.password, read.database) == (meant["user"], meant["password"], meant["database"])
    assert read.hosts == meant["hosts"]
    assert DatabaseUrl(read.reveal()) == read
    addresses, parameters = as_asyncpg_reads(read.reveal())
    assert (parameters.user, parameters.password, parameters.database) == (read.user, read.password, read.database)
    assert parameters.server_settings == {"application_name": meant["user"]}
    assert addresses == [
        f"{host}/.s.PGSQL.{port or 5432}" if host.startswith("/") else (host, port or 5432)
        for host, port in meant["hosts"]
    ]


def test_a_port_without_a_host_reaches_the_driver() -> None:
    """The default host is asked for at the port of the URL, and the default database is left to the driver."""
    addresses, parameters = as_asyncpg_reads(DatabaseUrl("postgresql://amp@:5433").reveal())
    assert addresses[-1] == ("localhost", 5433)
    assert parameters.database == "amp"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGDATABASE", "metadata")
        assert as_asyncpg_reads(DatabaseUrl("postgresql://amp@h").reveal())[1].database == "metadata"
        assert as_asyncpg_reads(DatabaseUrl("postgresql://").reveal())[1].database == "metadata"


@given(urls(), st.sampled_from(["", "&sslpassword="]))
@examples(100)
@example(("postgresql://user:p%61ssw0rd@h/db", {"password": "passw0rd"}), "")
@example(("postgresql://h/db?password=p%61ss+w0rd", {"password": "pass+w0rd"}), "&sslpassword=")
def test_no_output_holds_a_password(made: tuple[str, dict[str, Any]], also_as: str) -> None:
    """No text of a URL holds its password, nor what is left of a text that did, however the URL had it."""
    url, meant = made
    password: str = meant["password"]
    if also_as:
        url += also_as + quote(password, safe="")
    read = DatabaseUrl(url)
    rest = DatabaseUrl(url)
    masked = {key: "*" if "password" in key else value for key, value in read.parameters.items()}
    rest._hidden = Hidden(("*", masked, set()))
    forms = {password, quote(password, safe="")}
    elsewhere = f"{rest!r} {rest.reveal()} {rest.label}"
    assume(not any(form in elsewhere for form in forms))
    shown = [str(read), repr(read), f"{read}", read.label, read.redact(url), read.redact(read.reveal())]
    shown.append(read.redact(f"could not log in with {password!s}"))
    assert [text for text in shown for form in forms if form in text] == []


@given(st.text(max_size=30), st.sampled_from(["", "postgresql://", "postgres://u:", "postgresql://u@h/?"]), st.text())
@examples(100)
def test_no_refusal_holds_the_text(before: str, scheme: str, after: str) -> None:
    """Whatever is not a URL, the error does not repeat it, and is a ConfigError."""
    secret, told = "hunter2secret", ""
    try:
        DatabaseUrl(f"{scheme}{before}{secret}{after}")
    except ConfigError as error:
        told = f"{error} {error!r} {error.__cause__} {error.__context__}"
    assert secret not in told


# libpq is what the URL is a URL of.


class _Option(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("keyword", "envvar", "compiled", "value", "label", "dispchar")),
        ("dispsize", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def libpq(server: Server) -> Callable[[str], dict[str, str] | None]:
    """A function from a URL to what libpq reads in it, None where it refuses it."""
    beside = sorted(Path(server.bindir).parent.glob("lib/libpq.so*")) + sorted(
        Path(server.bindir).parent.glob("lib/libpq*.dylib")
    )
    name = str(beside[0]) if beside else find_library("pq")
    if name is None:
        pytest.skip("NOT TESTED, no libpq to be had")
    library = ctypes.CDLL(name)
    library.PQconninfoParse.restype = ctypes.POINTER(_Option)
    library.PQconninfoParse.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.PQconninfoFree.argtypes = [ctypes.POINTER(_Option)]

    def parse(url: str) -> dict[str, str] | None:
        options = library.PQconninfoParse(url.encode(), None)
        if not options:
            return None
        found = {}
        for option in options:
            if option.keyword is None:
                break
            if option.value is not None:
                found[option.keyword.decode()] = option.value.decode()
        library.PQconninfoFree(options)
        return found

    return parse


@pytest.mark.any_server
@given(made=urls())
@examples(80)
def test_libpq_reads_the_same(libpq: Callable[[str], dict[str, str] | None], made: tuple[str, dict[str, Any]]) -> None:
    """libpq reads from every such URL exactly what ampd does."""
    url, _ = made
    ours, theirs = DatabaseUrl(url), libpq(url)
    assert theirs is not None
    hosts, ports = theirs.pop("host").split(","), theirs.pop("port", "").split(",")
    ports *= len(hosts) if len(ports) == 1 else 1
    assert [(host, int(port or 5432)) for host, port in zip(hosts, ports, strict=True)] == [
        (host, port or 5432) for host, port in ours.hosts
    ]
    assert theirs == {"user": ours.user, "password": ours.password, "dbname": ours.database} | ours.parameters


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
@pytest.mark.parametrize(
    "driver", ["asyncpg", "psycopg", "psycopg_async", "psycopg2", "psycopg2cffi", "pg8000", "aiopg"]
)
def test_urls_of_sqlalchemy_are_taken(scheme: str, driver: str) -> None:
    """The driver behind the scheme is SQLAlchemy's business; the rest of such a URL is as libpq has it."""
    url = DatabaseUrl(f"{scheme}+{driver}://u:hunter2@h:5433/db?sslmode=require")
    assert url == DatabaseUrl("postgresql://u:hunter2@h:5433/db?sslmode=require")
    assert str(url) == "postgresql://u:***@h:5433/db?sslmode=require"


WRITE = "write it as postgresql://user:***@host:5432/database, with the password for ***"


@pytest.mark.parametrize(
    ("scheme", "hint"),
    [
        ("postgresql+", WRITE),
        ("postgresql+asyncmy", WRITE),
        ("mysql+asyncpg", WRITE),
        ("cockroachdb+asyncpg", WRITE),
        (
            "jdbc:postgresql",
            f"remove jdbc: from its beginning, and put what follows the ? in libpq's words; or {WRITE}",
        ),
    ],
)
def test_schemes_of_others(scheme: str, hint: str) -> None:
    """Another scheme is refused, that of JDBC with what to make of it, and the URL not repeated."""
    with pytest.raises(ConfigError) as error:
        DatabaseUrl(f"{scheme}://u:hunter2@h/db")
    assert str(error.value) == f"the database URL does not begin with postgresql:// or postgres://\nhint: {hint}"


@pytest.mark.parametrize("url", ["postgresql+asyncpg://u:***@h/db", "postgresql://u@h/db?password=***"])
def test_a_password_that_was_hidden(url: str) -> None:
    """What SQLAlchemy prints of its URL, and ampd of its own, has lost the password: that is said, and what to give."""
    for hidden in (url, str(DatabaseUrl(url.replace("***", "hunter2")))):
        with pytest.raises(ConfigError) as error:
            DatabaseUrl(hidden)
        assert str(error.value) == (
            "the password of the database URL is ***, which stands for one that was hidden\n"
            "hint: give the URL that it was made from: of an SQLAlchemy engine "
            "engine.url.render_as_string(hide_password=False), of an ampd.DatabaseUrl reveal(); "
            "a password that is no more than that is written %2A%2A%2A"
        )


def test_a_password_of_asterisks() -> None:
    """A password that really is *** is taken percent-encoded, and stays so on its way to the driver."""
    url = DatabaseUrl("postgresql://u:%2A%2A%2A@h/db")
    assert url.password == "***"
    assert DatabaseUrl(url.reveal()) == url


class URL(NamedTuple):
    """What an URL of SQLAlchemy looks like."""

    drivername: str = "postgresql+asyncpg"

    def render_as_string(self, hide_password: bool = True) -> str:
        """Return the URL as a text."""
        return f"{self.drivername}://u:{'***' if hide_password else 'hunter2'}@h/db"


class Engine:
    """What an engine of SQLAlchemy looks like."""

    url = URL()


@pytest.mark.anyio
@pytest.mark.parametrize(("given", "name"), [(URL(), "url"), (Engine(), "engine.url")])
async def test_objects_of_sqlalchemy(given: Any, name: str) -> None:
    """A URL or an engine of SQLAlchemy's in place of a URL is refused with what to write."""
    kind = type(given).__name__
    way = f"not {kind}; give {name}.render_as_string(hide_password=False)"
    with pytest.raises(TypeError) as error:
        DatabaseUrl(given)
    assert str(error.value) == f"a database URL is a str, {way}"
    with pytest.raises(TypeError) as error:
        await ampd.migrate(given, migrations=())
    assert str(error.value).endswith(way)
    with pytest.raises(ConfigError) as refused:
        ampd.MetadataDb(url=given)
    assert refused.value.message == f"metadata_db.url: expected `str`, got `{kind}`{way.removeprefix(f'not {kind}')}"


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("<pg_url>", "<…>"),
        ("${PG_URL}", "${…}"),
        ("postgresql://${USER}:${PASSWORD}@h/d", "${…}"),
        ("postgresql://u:{{ secrets.password }}@h/d", "{{…}}"),
        ("postgresql://u:$(PASSWORD)@h/d", "$(…)"),
        ("postgresql://u:[YOUR-PASSWORD]@h/d", "[YOUR-…]"),
        ("postgresql://u:<the password>@h/d", "<…>"),
        ("postgresql://u@<host>:<port>/d", "<…>"),
    ],
)
def test_a_url_that_was_not_filled_in(url: str, form: str) -> None:
    """A template's URL is told at once, not after half a minute of looking for its host."""
    with pytest.raises(ConfigError) as error:
        DatabaseUrl(url)
    assert str(error.value) == (
        f"the database URL contains a placeholder, {form}, and not what belongs in its place\n"
        "hint: put the value there; where a password really contains that, write it percent-encoded"
    )


@pytest.mark.parametrize("password", ["a<b", "1<2>3", "$x(y)", "{x}", "%3Cpw%3E", "[x]"])
def test_a_password_that_only_looks_a_little_like_a_placeholder(password: str) -> None:
    """What no template contains is a password like any other."""
    assert DatabaseUrl(f"postgresql://u:{password}@h/d").password == unquote(password)


@pytest.mark.any_server
@pytest.mark.anyio
async def test_every_function_takes_the_spellings_of_others(database: Database) -> None:
    """A URL as SQLAlchemy or psycopg spell it leads each function to its database."""
    files = scripts("SELECT 1", "SELECT 2")
    for number, scheme in enumerate(("postgresql+asyncpg", "postgres+psycopg", "postgresql+psycopg2")):
        url, schema = database.url.replace("postgresql:", f"{scheme}:"), f"s{number}"
        await ampd.baseline(url, 1, migrations=files, schema=schema)
        assert len((await ampd.migrate(url, migrations=files, schema=schema)).applied) == 1
        assert (await ampd.status(url, migrations=files, schema=schema)).up_to_date
        with pytest.raises(ConfigError, match="there is nothing to resolve"):
            await ampd.resolve(url, 1, ampd.Resolution.APPLIED, migrations=files, schema=schema)
        assert (await ampd.migrate_schemas(url, [schema], migrations=files)).errors == {}
        metadata_db = ampd.MetadataDb(url=DatabaseUrl(url), schema=schema)
        async with ampd.open_pool(metadata_db, migrations=files) as pool:
            assert await pool.fetchval("SELECT current_schema()") == schema
