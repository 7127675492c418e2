"""The subjects of the benchmark: ampd and its peers, each with its origin, its layout of a folder and its command.

Every peer gets the treatment that suits it best: where a tool would split a file and send it statement by statement
unless told otherwise, the layout tells it otherwise.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import msgspec

from benchmarks.workload import PreparedMigration

CACHE = Path(__file__).parent.parent / ".cache" / "peers"

COLOR = re.compile(r"\x1b\[[\d;]*m")
ARCHITECTURE = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
DBMATE_BINARY = f"@dbmate/{sys.platform}-{ARCHITECTURE}/bin/dbmate"  # without the Node script that only starts it

ALEMBIC_ENVIRONMENT = """\
import os
import sqlalchemy
from alembic import context

url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""

ALEMBIC_REVISION = """\
from alembic import op

revision = {revision!r}
down_revision = {down_revision!r}


def upgrade() -> None:
    op.get_bind().exec_driver_sql({sql!r}, execution_options={{"no_parameters": True}})
"""

SQLSPEC_CONFIGURATION = """\
import os
from sqlspec.adapters.asyncpg import AsyncpgConfig

config = AsyncpgConfig(
    connection_config={"dsn": os.environ["DATABASE_URL"], "min_size": 1, "max_size": 1},
    migration_config={"script_location": "migrations"},
)
"""

# Flyway's own command line needs flyway-core-utilities, which Maven Central does not serve; by Maven's plugin it would
# start for three times as long.
FLYWAY_PROGRAM = Path(__file__).with_name("RunFlyway.java")


class Origin(msgspec.Struct, frozen=True):
    """Where a program comes from: the pinned release, the commands that fetch it, and where it then lies."""

    release: str
    commands: tuple[tuple[str, ...], ...]
    program: Path


class Subject(msgspec.Struct, frozen=True):
    """A migration tool: how it is had, how it lays out the scripts in a folder, how it is told to migrate.

    The command runs in that folder, with the URL in the variable that `url_variable` names as well.
    """

    name: str
    origin: Origin
    lay_out: Callable[[Sequence[PreparedMigration], Path], None]
    command: Callable[[str, str], Iterable[str]]
    url_variable: str = "DATABASE_URL"

    def argv(self, url: str) -> list[str]:
        """The command line for a URL."""
        return list(self.command(str(self.origin.program), url))


class Absent(msgspec.Struct, frozen=True):
    """A peer that could not be had, and why."""

    name: str
    reason: str


def obtain(subject: Subject) -> Subject | Absent:
    """Fetches a subject's program unless it is there already."""
    for command in subject.origin.commands:
        if subject.origin.program.exists():
            break
        try:
            environment = os.environ | {"GOBIN": str(CACHE / "bin")}
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        except FileNotFoundError:
            return Absent(subject.name, f"{command[0]} is not installed")
        except subprocess.CalledProcessError as failure:
            errors, output = (COLOR.sub("", text).strip().splitlines() for text in (failure.stderr, failure.stdout))
            words = errors[-1:] or output[:1] or ["no message"]  # Maven's errors are its output
            return Absent(subject.name, f"{Path(command[0]).name} failed: {words[0]}")
    return subject


def _cargo(crate: str, version: str, features: str, program: str) -> Origin:
    install = ("cargo", "install", f"{crate}@{version}", "--root", str(CACHE), "--no-default-features")
    return Origin(f"{crate} {version}", ((*install, "--features", features),), CACHE / "bin" / program)


def _go(module: str, version: str, program: str, *flags: str) -> Origin:
    install = ("go", "install", *flags, f"{module}@{version}")
    return Origin(f"{program} {version}", (install,), CACHE / "bin" / program)


def _pip(package: str, version: str, program: str, *companions: str) -> Origin:
    folder = CACHE / package
    create = (sys.executable, "-m", "venv", str(folder))
    install = (str(folder / "bin" / "pip"), "install", "--quiet", f"{package}=={version}", *companions)
    return Origin(f"{package} {version}", (create, install), folder / "bin" / program)


def _npm(package: str, version: str, program: str, *companions: str) -> Origin:
    folder = CACHE / package
    install = (
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(folder),
        f"{package}@{version}",
        *companions,
    )
    return Origin(f"{package} {version}", (install,), folder / "node_modules" / program)


def _maven(package: str, version: str, source: Path, *jars: str) -> Origin:
    """Jars, and a program of ours over them, whose class is what lies there in the end."""
    folder = CACHE / package
    copy = ("mvn", "--quiet", "--batch-mode", "dependency:copy", f"-DoutputDirectory={folder}")
    compile_source = ("javac", "-d", str(folder), "-cp", f"{folder}/*", str(source))
    commands = (*((*copy, f"-Dartifact={jar}") for jar in jars), compile_source)
    return Origin(f"{package} {version}", commands, folder / source.with_suffix(".class").name)


def _files(
    template: str, file_name: str = "{version}_{name}.sql"
) -> Callable[[Sequence[PreparedMigration], Path], None]:
    """A layout of one file per script, whose name and text are templates over version, number, name and sql."""

    def lay_out(scripts: Sequence[PreparedMigration], folder: Path) -> None:
        (folder / "migrations").mkdir()
        for number, script in enumerate(scripts, start=1):
            fields = {"number": f"{number:03}", **msgspec.structs.asdict(script)}
            path = folder / "migrations" / file_name.format_map(fields)
            path.write_text(template.format_map(fields), encoding="utf-8")

    return lay_out


def _alembic_layout(scripts: Sequence[PreparedMigration], folder: Path) -> None:
    (folder / "migrations" / "versions").mkdir(parents=True)
    (folder / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s/migrations\n")
    (folder / "migrations" / "env.py").write_text(ALEMBIC_ENVIRONMENT)
    down_revision = None
    for script in scripts:
        revision = str(script.version)
        text = ALEMBIC_REVISION.format(revision=revision, down_revision=down_revision, sql=script.sql)
        (folder / "migrations" / "versions" / f"{revision}_{script.name}.py").write_text(text, encoding="utf-8")
        down_revision = revision


def _sqlspec_layout(scripts: Sequence[PreparedMigration], folder: Path) -> None:
    (folder / "configuration.py").write_text(SQLSPEC_CONFIGURATION)
    _files("-- name: migrate-{version}-up\n{sql}\n-- name: migrate-{version}-down\nSELECT 1;\n")(scripts, folder)


def _graphile_migrate_layout(scripts: Sequence[PreparedMigration], folder: Path) -> None:
    """As its `commit` leaves them: numbered, each with its hash, which covers the hash before it."""
    committed = folder / "migrations" / "committed"
    committed.mkdir(parents=True)
    (folder / ".gmrc").write_text("{}\n")
    previous = ""
    for number, script in enumerate(scripts, start=1):
        sql = script.sql.strip() + "\n"
        digest = "sha1:" + hashlib.sha1(f"{previous}\n{sql}".lstrip().encode(), usedforsecurity=False).hexdigest()
        header = f"--! Previous: {previous or '-'}\n--! Hash: {digest}\n"
        (committed / f"{number:06}-{script.name}.sql").write_text(f"{header}\n{sql}", encoding="utf-8")
        previous = digest


def _dblifts_command(program: str, url: str) -> Iterator[str]:
    yield from (program, "--scripts", "migrations", "--db-url", url.replace("postgresql://", "postgresql+psycopg://"))
    yield from ("--db-password", unquote(urlsplit(url).password or "none"))  # it insists on one
    yield from ("--quiet", "--no-progress", "migrate")


def _flyways_command(program: str, url: str) -> Iterator[str]:
    folder, parts = Path(program).parent, urlsplit(url)
    login = {"user": unquote(parts.username or ""), "password": unquote(parts.password or "")}
    query = urlencode(login | dict(parse_qsl(parts.query)))
    yield from ("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")  # as suits a short run
    yield from ("-cp", f"{folder}:{folder}/*", Path(program).stem)
    yield f"jdbc:postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}?{query}"


AMPD = Subject(
    "ampd",
    Origin("ampd, this checkout", (), Path(sys.executable).with_name("ampd")),
    _files("{sql}"),
    lambda program, _url: (program, "migrate", "--migrations", "migrations"),
    url_variable="AMP_CONFIG_METADATA_DB__URL",
)

PEERS = (
    Subject(
        "sqlx",
        _cargo("sqlx-cli", "0.9.0", "postgres,rustls", "sqlx"),
        _files("{sql}"),
        lambda program, url: (program, "migrate", "run", "--no-dotenv", "--database-url", url),
    ),
    Subject(
        "goose",
        _go("github.com/pressly/goose/v3/cmd/goose", "v3.29.0", "goose"),
        _files("-- +goose Up\n-- +goose StatementBegin\n{sql}\n-- +goose StatementEnd\n"),
        lambda program, url: (program, "-dir", "migrations", "postgres", url, "up"),
    ),
    Subject(
        "golang-migrate",
        _go("github.com/golang-migrate/migrate/v4/cmd/migrate", "v4.20.1", "migrate", "-tags", "postgres"),
        _files("{sql}", "{version}_{name}.up.sql"),
        lambda program, url: (program, "-path", "migrations", "-database", url, "up"),
    ),
    Subject(
        "dbmate",
        _npm("dbmate", "2.36.0", DBMATE_BINARY),
        _files("-- migrate:up\n{sql}\n-- migrate:down\n"),
        lambda program, url: (program, "--url", url, "--migrations-dir", "migrations", "--no-dump-schema", "migrate"),
    ),
    Subject(
        "tern",
        _go("github.com/jackc/tern/v2", "v2.3.4", "tern"),
        _files("{sql}\n---- create above / drop below ----\n", "{number}_{name}.sql"),
        lambda program, url: (program, "migrate", "--migrations", "migrations", "--conn-string", url),
    ),
    Subject(
        "Alembic",
        _pip("alembic", "1.20.1", "alembic", "psycopg[binary]==3.3.9"),
        _alembic_layout,
        lambda program, _url: (program, "upgrade", "head"),
    ),
    Subject(
        "yoyo",
        _pip("yoyo-migrations", "9.0.0", "yoyo", "psycopg[binary]==3.3.9", "setuptools<81"),
        _files("{sql}"),
        lambda program, url: (
            *(program, "apply", "--batch", "--no-config-file", "--database"),
            *(url.replace("postgresql://", "postgresql+psycopg://"), "migrations"),
        ),
    ),
    Subject(
        "sqlspec",
        _pip("sqlspec", "0.69.0", "sqlspec", "asyncpg"),
        _sqlspec_layout,
        lambda program, _url: (program, "--config", "configuration.config", "upgrade", "--no-prompt"),
    ),
    Subject(
        "node-pg-migrate",
        _npm("node-pg-migrate", "9.0.0", ".bin/node-pg-migrate", "pg@8.23.1"),
        _files("-- Up Migration\n{sql}\n-- Down Migration\n"),
        lambda program, _url: (program, "up", "--migrations-dir", "migrations", "--verbose", "false"),
    ),
    Subject(
        "graphile-migrate",
        _npm("graphile-migrate", "1.4.1", ".bin/graphile-migrate", "pg@8.23.1"),
        _graphile_migrate_layout,
        lambda program, _url: (program, "migrate"),
    ),
    Subject(
        "yandex-pgmigrate",
        _pip("yandex-pgmigrate", "1.0.13", "pgmigrate"),
        _files("/* pgmigrate-encoding: utf-8 */\n{sql}", "V{version}__{name}.sql"),
        lambda program, url: (program, "migrate", "--target", "latest", "--conn", url),
    ),
    Subject(
        "dblift",
        _pip("dblift", "5.1.0", "dblift", "dblift[cli,postgresql]", "psycopg[binary]==3.3.9"),
        _files("{sql}", "V{version}__{name}.sql"),
        _dblifts_command,
    ),
    Subject(
        "Flyway",
        _maven(
            *("flyway", "13.12.2", FLYWAY_PROGRAM, "org.flywaydb:flyway-core:13.12.2"),
            *("org.flywaydb:flyway-database-postgresql:13.12.2", "org.postgresql:postgresql:42.7.14"),
        ),
        _files("{sql}", "V{version}__{name}.sql"),
        _flyways_command,
    ),
)
