"""`ampd solo`: what it makes, takes over and says."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import asyncpg
import msgspec
import pytest

import ampd as library
from ampd.errors import ConfigError
from ampd.local_server.folders import make_amps_folders, user_name
from ampd.local_server.launcher import Launcher
from ampd.local_server.layout import Layout
from ampd.local_server.server import local_server
from tests.cli_output import plain, seen
from tests.servers import Ampd, Server, anothers_server, copy_cluster
from tests.test_amp_takeover import AMPS_OWN_WAY, FILES, SQLX, SQLX_ROWS

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

NOBODY = 65534
VERSION = FILES[-1].version


def own(path: Path) -> str:
    """Give a cluster to a user who is not called as its superuser is, and return the user's name."""
    if os.geteuid() == 0:
        for each in (path, *path.rglob("*")):
            os.chown(each, NOBODY, NOBODY)
    return user_name(path.stat().st_uid)


@pytest.fixture
async def amps_cluster(server: Server, open_path: Path) -> Path:
    """A cluster as amp's own `ampd solo` makes it, by initdb without --username, in the folder `amp`."""
    data_dir = copy_cluster(server.cluster, open_path / "amp" / "metadb")
    script = f"UPDATE pg_authid SET rolname = '{own(data_dir)}' WHERE oid = 10\nDROP DATABASE amp\n"
    await single(server, data_dir, script)
    return data_dir


async def single(server: Server, data_dir: Path, script: str) -> None:
    """Run statements, one a line, in a cluster that has no server."""
    launcher, program = Launcher.choose(data_dir), Path(server.bindir) / "postgres"
    log = data_dir.with_name("single.log")
    await launcher.run(program, "--single", "-D", data_dir, "postgres", log=log, stdin=script.encode())
    assert "ERROR" not in log.read_text()


@pytest.fixture
def solo(ampd: Ampd, server: Server, open_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts `ampd solo` on the folder `amp`, with the PostgreSQL that this run is about."""

    def start(*options: str, **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": f"{server.bindir}:{os.environ['PATH']}", **variables}
        return ampd.start("solo", "--amp-dir", open_path / "amp", *options, env=environment)

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return code, stdout and stderr of a process, once it has ended."""
    stdout, stderr = process.communicate(timeout=60)
    return seen(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr))


def wait_until_ready(process: subprocess.Popen[str]) -> str:
    """Return what a process has written to stderr when it is ready."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("ready"):
            break
    return "".join(lines)


async def test_amps_own_database_is_used_and_taken_over(
    amps_cluster: Path, server: Server, solo: Callable[..., subprocess.Popen[str]]
) -> None:
    """What amp's own `ampd solo` has made and migrated is recorded as applied, and migrated on."""
    bindir, owner = Path(server.bindir), user_name(amps_cluster.stat().st_uid)
    async with local_server(amps_cluster, bindir=bindir) as local:
        assert local.layout == Layout("postgres", owner)
        await library.migrate(local.url, migrations=FILES)
        connection = await asyncpg.connect(local.url)
        await connection.execute(f"{AMPS_OWN_WAY} {SQLX} {SQLX_ROWS}; ALTER TABLE tags ADD note text")
        await connection.close()
    look = (
        "; to look at the database, start its server without migrating: "
        f"`AMP_CONFIG_METADATA_DB__AUTO_MIGRATE=false ampd solo --amp-dir {amps_cluster.parent}`\n"
    )
    code, stdout, stderr = ended(solo())
    assert (code, stdout) == (1, "")
    assert "  + tags: note text\nhint: if a newer amp has migrated this database" in stderr
    assert stderr.endswith(look)

    looking = solo(AMP_CONFIG_METADATA_DB__AUTO_MIGRATE="false")
    assert 'error: "public" is migrated by sqlx: its history' in wait_until_ready(looking)
    assert looking.stdout is not None
    connection = await asyncpg.connect(looking.stdout.readline().strip())
    await connection.execute("ALTER TABLE tags DROP note")
    await connection.close()
    looking.send_signal(signal.SIGINT)
    assert ended(looking)[0] == 130

    code, stdout, stderr = ended(solo("--once"))
    where = f"{amps_cluster}:5432/postgres"
    assert (code, stdout.partition("\n")[0]) == (0, f"{where}: up to date, at version {VERSION}"), stderr
    rows = "".join(f"  {file.version} {file.name:18}  TIME\n" for file in FILES)
    taken = f"{where} has been migrated by amp's own ampd: recorded as applied, without running them:\n{rows}"
    assert (plain(stderr), stdout.count("  baseline  ")) == (taken, len(FILES))


async def test_a_cluster_of_neither_layout(amps_cluster: Path, server: Server) -> None:
    """It is refused, with the server's own words."""
    owner = user_name(amps_cluster.stat().st_uid)
    await single(server, amps_cluster, "UPDATE pg_authid SET rolname = 'admin' WHERE oid = 10\n")
    with pytest.raises(ConfigError) as error:
        async with local_server(amps_cluster, bindir=Path(server.bindir)):
            pass
    assert str(error.value) == (
        f"the cluster in {amps_cluster} is neither ampd's nor amp's: role \"postgres\" does not exist, and "
        f'role "{owner}" does not exist\nhint: choose another folder with --amp-dir'
    )


async def test_a_server_that_amps_own_ampd_runs_is_left_alone(amps_cluster: Path, server: Server) -> None:
    """It is not stopped under the feet of the program that has started it."""
    owner, bindir = user_name(amps_cluster.stat().st_uid), Path(server.bindir)
    program = amps_cluster.with_name("ampd")
    program.write_text('#!/bin/sh\n"$@" &\nwait\n')
    program.chmod(0o755)
    chosen = msgspec.structs.replace(Launcher.choose(amps_cluster), prefix=[])
    async with anothers_server(chosen, amps_cluster, program, bindir / "postgres") as process:
        with pytest.raises(ConfigError) as error:
            async with local_server(amps_cluster, bindir=bindir):
                pass
        url = f"postgresql:///postgres?host={amps_cluster}&port=5432&user={owner}"
        assert str(error.value) == (
            f"amp's own ampd (pid {process.pid}) runs the server in {amps_cluster}\n"
            f"hint: use it at {url}, or stop it, or choose another folder with --amp-dir"
        )
        connection = await asyncpg.connect(url)
        await connection.close()


async def test_what_it_says_and_makes(
    server: Server, open_path: Path, solo: Callable[..., subprocess.Popen[str]]
) -> None:
    """The URL is ready to be pasted, with what to try next; amp's folders are made beside the database."""
    (open_path / "amp").mkdir()
    copy_cluster(server.cluster, open_path / "amp" / "metadb")
    (open_path / "psql").write_text("")
    (open_path / "psql").chmod(0o755)
    process = solo(PATH=f"{server.bindir}:{open_path}:{os.environ['PATH']}")
    told = wait_until_ready(process)
    url = f"postgresql://postgres@/amp?host={open_path}/amp/metadb&port=5432"
    assert plain(told).partition("garbage_collection  N ms\n")[2] == (
        f"try:\n  psql '{url}'\n  ampd status --url '{url}'\n  export AMP_CONFIG_METADATA_DB__URL='{url}'\n"
        "ready; Ctrl+C stops it\n"
    )
    assert {"data", "manifests", "providers"} <= {path.name for path in (open_path / "amp").iterdir() if path.is_dir()}
    process.send_signal(signal.SIGINT)
    assert ended(process) == (
        130,
        f"up to date, at version {VERSION}\n{url}\n",
        "SIGINT: stopped\n",
    )


def test_amps_folders_may_be_there(tmp_path: Path) -> None:
    """A link to another disk is as good; a file in the place of one is named."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").symlink_to("elsewhere")
    make_amps_folders(tmp_path)
    make_amps_folders(tmp_path)
    assert (tmp_path / "data").is_symlink()
    (tmp_path / "manifests").rmdir()
    (tmp_path / "manifests").touch()
    with pytest.raises(ConfigError) as error:
        make_amps_folders(tmp_path)
    assert str(error.value) == (
        f"cannot make the folder {tmp_path}/manifests: File exists\nhint: choose another folder with --amp-dir"
    )


def test_a_folder_that_cannot_even_be_looked_for(ampd: Ampd) -> None:
    """Before the server the configuration is sought in the folder; what stands in the way of that is told as well."""
    name = "x" * 300
    assert ampd("solo", "--amp-dir", name).stderr == (
        f"error: cannot keep a database in {name}: {name}/config.toml: File name too long\n"
        "hint: choose another folder with --amp-dir\n"
    )


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    """Where a relative path leads nowhere the message says so."""
    (gone := tmp_path / "gone").mkdir()
    program = (
        "import os, sys, ampd.cli.commands; os.rmdir(os.getcwd()); sys.exit(ampd.cli.commands.run(['solo', '--once']))"
    )
    process = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=gone, env={}, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (
        1,
        "error: cannot keep a database in .amp/metadb: No such file or directory\n"
        "hint: choose another folder with --amp-dir\n",
    )


SEEN_BY_EVERYBODY = "[metadata_db]\nurl = 'postgresql://127.0.0.1:1/d'\nmigrations.connect_wait_secs = 0\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="what root must not do")
@pytest.mark.parametrize("theirs", [".amp", ".amp/config.toml"])
def test_a_configuration_of_another_user_is_not_read(ampd: Ampd, theirs: str) -> None:
    """What a stranger has put in a folder that everybody may write to names no database and no migrations to be run."""
    ampd.folder.chmod(0o1777)
    (ampd.folder / ".amp").mkdir()
    (ampd.folder / ".amp" / "config.toml").write_text(SEEN_BY_EVERYBODY)
    assert "127.0.0.1:1/d cannot be reached" in ampd("solo", "--once").stderr  # it is found by itself
    os.chown(ampd.folder / theirs, NOBODY, NOBODY)
    what = "read the configuration in .amp" if theirs == ".amp" else f"read the configuration {theirs}"
    remedy = "" if theirs == ".amp" else "remove it, or "
    assert ampd("solo", "--once").stderr == (
        f"error: cannot {what}: it belongs to {user_name(NOBODY)}\nhint: {remedy}choose another folder with --amp-dir\n"
    )
    named = ampd("solo", "--once", "--config", ".amp/config.toml").stderr  # by somebody who knows what is in it
    assert "127.0.0.1:1/d cannot be reached" in named


@pytest.mark.parametrize("open_to_others", [".amp", ".amp/config.toml"])
def test_a_configuration_that_others_can_write_to_is_not_read(ampd: Ampd, open_to_others: str) -> None:
    """Nor is one that somebody else could have written."""
    (ampd.folder / ".amp").mkdir()
    (ampd.folder / ".amp" / "config.toml").write_text(SEEN_BY_EVERYBODY)
    (ampd.folder / open_to_others).chmod(0o777)
    what = "in .amp" if open_to_others == ".amp" else open_to_others
    assert ampd("solo", "--once").stderr == (
        f"error: cannot read the configuration {what}: it can be written to by everybody\n"
        f"hint: chmod go-w {ampd.folder / open_to_others}, or choose another folder with --amp-dir\n"
    )
