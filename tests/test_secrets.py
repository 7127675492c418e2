"""No password in the local variables of a traceback, which error trackers collect, however a run fails."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import anyio
import asyncpg
import msgspec
import pytest

import ampd
from ampd.config_sources import read_config
from ampd.database_url import DatabaseUrl
from ampd.redaction import Hidden, without_frames
from tests.scenes import GENEROUS, scripts, transaction
from tests.servers import Database, Proxy, free_port
from tests.test_startup import Door, fatal

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

SECRET = "hunter2/secr@t"
FORMS = (SECRET, quote(SECRET, safe=""))
IMPATIENT = ampd.Limits(connect_wait_secs=0, lock_timeout_secs=0.1, lock_retry_secs=0.2)
URL = "AMP_CONFIG_METADATA_DB__URL"


def chained(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that has led to it, whether or not a traceback would print it."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            left += [it for it in (each.__cause__, each.__context__, *getattr(each, "exceptions", ())) if it]


def frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames of every traceback, but for those of the tests and what runs them."""
    for each in chained(error):
        traceback = each.__traceback__
        while traceback is not None:
            module = str(traceback.tb_frame.f_globals["__name__"])
            if module.partition(".")[0] not in ("tests", "pytest", "_pytest", "pluggy"):
                yield traceback.tb_frame
            traceback = traceback.tb_next


def collected(value: object) -> Iterator[str]:
    """Yield what collectors show of a variable: it, what it contains, and what its attributes are."""
    yield repr(value)
    inside = [*value.items()] if isinstance(value, Mapping) else value if isinstance(value, list | tuple | set) else []
    attributes = list(getattr(value, "__dict__", {}).values())
    if not isinstance(
        value, asyncpg.Connection | asyncpg.Pool
    ):  # the driver's connections and pools keep the password in theirs
        slots = [
            name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)
        ]
        attributes += [getattr(value, name, None) for name in slots if not name.startswith("__")]
    for each in (*inside, *attributes):
        yield repr(each)


def assert_tells_nothing(error: BaseException) -> None:
    """Insist that no frame, and no text, of an error or what has led to it shows the password."""
    told = [f"{type(each).__name__}: {each}" for each in chained(error) if any(form in str(each) for form in FORMS)]
    for frame in frames(error):
        where = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
        for name, value in frame.f_locals.items():
            if any(form in text for text in collected(value) for form in FORMS):
                told.append(f"{where}: {name}")
    assert told == []


def with_password(url: str, form: str) -> str:
    """Return a URL with the password in one of its forms."""
    joint = "&" if "?" in url else "?"
    match form:
        case "encoded":
            return url.replace("@", f":{FORMS[1]}@", 1)
        case "plain":
            return url.replace("@", f":{SECRET.replace('/', '%2F').replace('@', '%40')}@", 1)
        case _:
            return f"{url}{joint}{form}={FORMS[1]}"


FILES = scripts("CREATE TABLE t ()")
USELESS = {
    "no_scheme": "mysql://u@h/d",
    "port": "postgresql://u@h:x/d",
    "bracket": "postgresql://u@[::1/d",
    "ports": "postgresql://u@h,i/d?port=1,2,3",
    "at": "postgresql://u@h/d@x",
    "nul": "postgresql://u@h/d%00",
    "parameter": "postgresql://u@h/d?sslMode=require",
    "number": "postgresql://u@h/d?connect_timeout=x",
    "attributes": "postgresql://u@h/d?target_session_attrs=none",
    "file": "postgresql://u@h/d?sslrootcert=/nowhere",
    "channel_binding": "postgresql://u@h/d?channel_binding=require",
    "unknown_host": "postgresql://u@nowhere.invalid/d",
    "sslmode": "postgresql://u@localhost/d?sslmode=perhaps",
}
FAILING = {
    "invalid": "SELECT 'unclosed",
    "failing": "SELECT 1/0",
    "failing_no_transaction": "-- no-transaction\nSELECT 1/0",
    "lost": "SELECT pg_terminate_backend(pg_backend_pid())",
}
REFUSING = ("refused", "tls", "no_database", "no_role", "wrong_password", "hung_up", "setting", "silent")
OTHERS = ("conflict", "blocked")


@asynccontextmanager
async def scene(name: str, database: Database) -> AsyncIterator[tuple[str, tuple[ampd.Migration, ...]]]:
    """Set up one way to fail, and yield a URL and what is to be migrated there."""
    async with AsyncExitStack() as stack:
        url, files = database.url, FILES
        match name:
            case "refused":
                url = f"postgresql://u@127.0.0.1:{free_port()}/d"
            case "tls":
                url = f"{database.url}?sslmode=require"
            case "no_database":
                url = database.server.url("nowhere")
            case "no_role":
                url = database.server.url(database.name, "nobody")
            case "wrong_password":
                answer = fatal("28P01", f"password authentication failed, {SECRET} it was")
                url = (await stack.enter_async_context(Door(database, refusals=99, answer=answer))).url(database)
            case "hung_up":
                url = (await stack.enter_async_context(Door(database, refusals=99))).url(database)
            case "setting":
                url = f"{database.url}?options=-c%20nonsense%3D1"
            case "silent":
                line = await stack.enter_async_context(Proxy(database.server.host, database.server.port))
                line.silent = True
                url = f"postgresql://u@{line.host}:{line.port}/d?connect_timeout=1"
            case "conflict":
                await ampd.migrate(url, migrations=scripts("SELECT 1"))
            case "blocked":
                await database.execute("CREATE TABLE busy ()")
                await stack.enter_async_context(transaction(database, "SELECT FROM busy"))
                files = scripts("ALTER TABLE busy ADD x int")
            case "migrating":
                files = scripts("SELECT pg_sleep(600)")
            case _ if name in FAILING:
                files = scripts(FAILING[name])
            case _:
                url = USELESS[name]
        yield url, files


@pytest.mark.parametrize("name", [*USELESS, *REFUSING, *FAILING, *OTHERS])
@pytest.mark.parametrize("form", ["plain", "encoded", "password", "sslpassword"])
async def test_a_run_that_fails(database: Database, name: str, form: str, tmp_path: Path) -> None:
    """A URL's password is in no frame, whether the URL is a str, configured, or was given to a pool."""
    async with scene(name, database) as (bare, files):
        url = with_password(bare, form)
        with pytest.raises(ampd.AmpdError) as raised:
            await ampd.migrate(url, migrations=files, limits=IMPATIENT)
        assert_tells_nothing(raised.value)
        (file := tmp_path / "config.toml").write_text(f"[metadata_db]\nauto_migrate = true\nurl = '{url}'\n")
        file.chmod(0o600)
        with pytest.raises(ampd.AmpdError) as opened:
            async with ampd.open_pool(ampd.load_config(file).metadata_db, migrations=files, limits=IMPATIENT):
                pass
        assert_tells_nothing(opened.value)
        if name not in USELESS:
            lends = url.replace("connect_timeout=1", "sslmode=disable")
            async with asyncpg.create_pool(lends, min_size=0, max_size=2, timeout=1) as pool:
                with pytest.raises(ampd.AmpdError) as lent:
                    await ampd.migrate(pool, migrations=files, limits=IMPATIENT)
            assert_tells_nothing(lent.value)


@pytest.mark.parametrize("name", ["refused", "tls", "hung_up", "silent", "failing", "wrong_password"])
@pytest.mark.parametrize("where", ["PGPASSWORD", "passfile"])
async def test_a_password_from_elsewhere(
    database: Database, name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds for a password from the environment or from a password file."""
    async with scene(name, database) as (bare, files):
        url = bare
        if where == "PGPASSWORD":
            monkeypatch.setenv("PGPASSWORD", SECRET)
        else:
            (file := tmp_path / "pgpass").write_text(f"*:*:*:*:{SECRET}\n")
            file.chmod(0o600)
            url += f"{'&' if '?' in url else '?'}passfile={file}"
        with pytest.raises(ampd.AmpdError) as raised:
            await ampd.migrate(url, migrations=files, limits=IMPATIENT)
        assert_tells_nothing(raised.value)
        if where == "passfile":
            monkeypatch.setenv("PGPASSFILE", str(file))
        lends = bare.replace("connect_timeout=1", "sslmode=disable")
        async with asyncpg.create_pool(lends, min_size=0, max_size=2, timeout=1) as pool:
            with pytest.raises(ampd.AmpdError) as lent:
                await ampd.migrate(pool, migrations=files, limits=IMPATIENT)
        assert_tells_nothing(lent.value)


async def test_a_password_that_is_given_to_a_pool(database: Database) -> None:
    """A server repeats the password that `open_pool`, or a pool of the caller's, has as an option: it is not shown."""
    answer = fatal("28P01", f"bind failed, {SECRET} it was")
    async with Door(database, answer=answer) as door:
        url = door.url(database)
        metadata_db = ampd.MetadataDb(url=url)  # type: ignore[arg-type]
        await ampd.migrate(url, migrations=FILES)

        async def refuse(_: object) -> None:
            door.refusals = 99

        async with asyncpg.create_pool(url, password=SECRET, min_size=0) as pool:
            door.refusals = 99
            with pytest.raises(ampd.AmpdError) as lent:
                await ampd.status(pool, migrations=FILES, limits=IMPATIENT)
        assert_tells_nothing(lent.value)
        assert "bind failed, *** it was" in str(lent.value)
        door.refusals = 0
        with pytest.raises(ampd.AmpdError) as opened:
            async with ampd.open_pool(metadata_db, migrations=FILES, password=SECRET, min_size=2, init=refuse):
                pass
        assert_tells_nothing(opened.value)
        assert "bind failed, *** it was" in str(opened.value)


CONFIGURED = f"postgresql://u:{FORMS[1]}@h/d"


@pytest.mark.parametrize(
    ("content", "environ"),
    [
        (f"metadata_db.url = '{CONFIGURED}'\nmetadata_db.pool_sise = 1", {}),
        (f"metadata_db.url = '{CONFIGURED}'\nmetadata_db.pool_size = 'x'", {}),
        (f"metadata_db.url = '{CONFIGURED}'\nmetadata_db.migrations = 1", {}),
        (f"metadata_db.url = '{CONFIGURED}'\nmetadata_db.schema = 'pg_x'", {}),
        (f"metadata_db.url = '{CONFIGURED}@'", {}),
        (f"metadata_db_url = '{CONFIGURED.replace('/d', ':x/d')}'", {}),
        (f"metadata_db.url = ['{CONFIGURED}']", {}),
        (f"metadata_db = '{CONFIGURED}'", {}),
        (f"metadata_db.url = '{CONFIGURED}\n", {}),
        (f"metadata_db.url = '{CONFIGURED}'\n\xff", {}),
        (f"metadata_db.url = '{CONFIGURED}'\na = {'[' * 9999}", {}),
        ("", {URL: CONFIGURED.replace("/d", ":x/d")}),
        ("", {"AMP_CONFIG_METADATA_DB_URL": CONFIGURED.replace("/d", ":x/d")}),
        ("", {URL: CONFIGURED, "AMP_CONFIG_METADATA_DB__POOL_SISE": "1"}),
        ("", {URL: CONFIGURED, "AMP_CONFIG_METADATA_DB__POOL_SIZE": "x"}),
        ("", {URL: CONFIGURED, "AMP_CONFIG": "/nowhere.toml"}),
    ],
)
def test_a_configuration_that_is_wrong(
    tmp_path: Path, content: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the file, nor the environment, nor what was read of them is in a frame."""
    (file := tmp_path / "config.toml").write_bytes(content.encode("latin-1"))
    file.chmod(0o600)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ampd.ConfigError) as raised:
        ampd.load_config(None if "AMP_CONFIG" in environ else file)
    assert_tells_nothing(raised.value)
    with pytest.raises(ampd.ConfigError) as read:
        read_config(None if "AMP_CONFIG" in environ else file, environ)
    assert_tells_nothing(read.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DatabaseUrl(CONFIGURED.replace("/d", ":x/d")),
        lambda: DatabaseUrl(CONFIGURED.encode()),  # type: ignore[arg-type]
        lambda: ampd.MetadataDb(url=CONFIGURED.replace("/d", ":x/d")),  # type: ignore[arg-type]
        lambda: ampd.MetadataDb(url=f"mysql{CONFIGURED}"),  # type: ignore[arg-type]
        lambda: ampd.MetadataDb(url=CONFIGURED, pool_size=-1),  # type: ignore[arg-type]
        lambda: ampd.MetadataDb(url=[CONFIGURED]),  # type: ignore[arg-type]
        lambda: ampd.Config(metadata_db={"url": CONFIGURED, "pool_sise": 1}),  # type: ignore[arg-type]
    ],
)
def test_values_built_in_code(make: Callable[[], object]) -> None:
    """What is refused when it is put together is in no frame either."""
    with pytest.raises((ampd.ConfigError, TypeError)) as raised:
        make()
    assert_tells_nothing(raised.value)


async def test_arguments_of_the_wrong_kind(database: Database) -> None:
    """A URL where none belongs, or beside an argument that is wrong, is not shown."""
    url = with_password(database.url, "encoded")
    options: dict[str, Any] = {"password": SECRET, "min_size": 1}
    metadata_db = ampd.MetadataDb(url=database.url)  # type: ignore[arg-type]
    wrong: list[Callable[[], Any]] = [
        lambda: ampd.migrate(url.encode(), migrations=FILES),
        lambda: ampd.migrate([url], migrations=FILES),
        lambda: ampd.migrate(url, migrations=FILES, target=9),
        lambda: ampd.migrate(url, migrations=FILES, schema="pg_x"),
        lambda: ampd.migrate(url, migrations="x"),  # type: ignore[arg-type]
        lambda: ampd.status(url, migrations=FILES, limits=1),  # type: ignore[arg-type]
        lambda: ampd.resolve(url, 1, "applied", migrations=FILES),  # type: ignore[arg-type]
        lambda: ampd.resolve(url, 1, ampd.Resolution.APPLIED, migrations=FILES),
        lambda: ampd.baseline(url, 99, migrations=FILES),
        lambda: ampd.open_pool(url).__aenter__(),  # type: ignore[arg-type]
        lambda: ampd.open_pool(metadata_db, nonsense=1, **options).__aenter__(),
        lambda: ampd.open_pool(metadata_db, max_size=-1, **options).__aenter__(),
        lambda: ampd.open_pool(metadata_db, migrations=FILES, **options).__aenter__(),
        lambda: ampd.open_pool(metadata_db, migrations=(), ssl="perhaps", **options).__aenter__(),
        lambda: ampd.open_pool(metadata_db, migrations=(), server_settings={"nonsense": "1"}, **options).__aenter__(),
        lambda: ampd.open_pool(metadata_db, migrations=(), init=fall_over, password=SECRET).__aenter__(),
    ]
    for call in wrong:
        with pytest.raises((ampd.AmpdError, TypeError, ZeroDivisionError)) as raised:
            await call()
        assert_tells_nothing(raised.value)


async def fall_over(_: object) -> None:
    """Fail as a callback of the service's may."""
    raise ZeroDivisionError


@pytest.mark.parametrize("name", ["connecting", "migrating", "blocked"])
@pytest.mark.parametrize("lent", [False, True], ids=["url", "pool"])
async def test_a_run_that_is_cancelled(database: Database, name: str, lent: bool) -> None:
    """Nor is there a password in the traceback of a cancellation, wherever it has come."""
    async with scene({"connecting": "silent"}.get(name, name), database) as (url, files), AsyncExitStack() as stack:
        secret = f"{with_password(url.partition('?')[0], 'encoded')}?sslmode=disable"
        pool = asyncpg.create_pool(secret, min_size=0, max_size=1)
        source = await stack.enter_async_context(pool) if lent else secret
        run = asyncio.create_task(ampd.migrate(source, migrations=files))
        await asyncio.sleep(0.5)
        run.cancel()
        with anyio.fail_after(GENEROUS), pytest.raises(asyncio.CancelledError) as raised:
            await run
        assert_tells_nothing(raised.value)


async def test_a_listener_that_raises(database: Database, tmp_path: Path) -> None:
    """What a listener raises comes through frames without a password, a remark before connecting included."""
    (file := tmp_path / "pgpass").write_text(f"*:*:*:*:{SECRET}\n")
    file.chmod(0o644)

    def listen(_: object) -> None:
        raise ZeroDivisionError

    for url in (with_password(database.url, "encoded"), f"{database.url}?passfile={file}&sslpassword={FORMS[1]}"):
        with pytest.raises(ZeroDivisionError) as raised:
            await ampd.migrate(url, migrations=FILES, on_event=listen)
        assert_tells_nothing(raised.value)


def test_a_url_is_the_same_after_a_journey() -> None:
    """A URL that hides its password can still be copied and pickled, and compares equal."""
    url = DatabaseUrl(f"postgresql://u:{FORMS[1]}@h/d?sslpassword=x")
    assert pickle.loads(pickle.dumps(url)) == url
    section = ampd.MetadataDb(url=url)
    assert pickle.loads(pickle.dumps(section)) == section
    assert msgspec.structs.replace(section, pool_size=3).url == url


def test_only_the_frames_of_the_package_are_taken_out() -> None:
    """What is left of a traceback are the frames of everybody else, in their order, with their lines."""

    def fail() -> None:
        try:
            Hidden(1).nonsense  # type: ignore[attr-defined]  # noqa: B018
        except AttributeError:
            DatabaseUrl.with_parameters(3, {})  # type: ignore[arg-type]

    with pytest.raises(AttributeError) as raised:
        fail()
    error = raised.value
    whole = [frame.f_code.co_name for frame in all_frames(error)]
    assert whole == ["test_only_the_frames_of_the_package_are_taken_out", "fail", "with_parameters"]
    without_frames(error, "ampd")
    assert [frame.f_code.co_name for frame in all_frames(error)] == whole[:2]
    without_frames(error)
    assert [each.__traceback__ for each in chained(error)] == [None, None]


def all_frames(error: BaseException) -> list[FrameType]:
    """Return the frames of an error's own traceback."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        found.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return found
