"""What `examples/` shows, run for real: services under their servers, workers, and the files of a deployment."""

import configparser
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests import scenes
from tests.repetition import TIMES
from tests.servers import Ampd, Database
from tests.services import (
    EXAMPLES,
    GUNICORN,
    HYPERCORN,
    PATIENCE_SECS,
    UVICORN,
    Recipe,
    environment,
    service,
    with_ampd,
)

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

SHOP = EXAMPLES / "shop" / "migrations"
APPLIED = [(1, True, 1), (2, True, 1)]
ADVISORY_LOCKS = """
    SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the examples whose files a test may change."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__")))


def run(*command: str, folder: Path, url: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the examples to its end."""
    process = start(*command, folder=folder, url=url, **env)
    stdout, stderr = process.communicate(timeout=PATIENCE_SECS)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def start(*command: str, folder: Path, url: str, **env: str) -> subprocess.Popen[str]:
    """Start a command of the examples, and leave it running."""
    pipe = subprocess.PIPE
    env = environment(url, PYTHONPATH=str(folder), **env)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("recipe", [UVICORN, GUNICORN, HYPERCORN], ids=lambda recipe: recipe.module)
@pytest.mark.parametrize("_start", range(TIMES))
async def test_workers_start_on_an_empty_database(database: Database, recipe: Recipe, _start: int) -> None:
    """All workers migrate one empty database at once: each migration runs once, and every worker serves."""
    with service(recipe, database.url) as running:
        running.wait_for(recipe.says, recipe.workers)
        asked: set[str] = set()
        while len(asked) < (recipe.workers if recipe is UVICORN else 1):  # the others may let one worker answer all
            asked.add(json.loads(running.get("/visit"))["worker"])
        assert await scenes.history(database) == APPLIED
        assert {row[0] for row in await database.fetch("SELECT worker FROM visits")} == asked
        assert ("visits_worker", True) in await scenes.indexes(database, "visits")
        if recipe is GUNICORN:
            assert running.get("/ready") == '{"ready":true}'
    assert running.process.returncode in {0, -signal.SIGTERM}
    assert re.findall(r"ERROR|Traceback|Warning", running.log) == []
    assert await database.fetchval(ADVISORY_LOCKS) == 0


async def test_a_service_refuses_a_schema_that_is_behind(database: Database, ampd: Ampd) -> None:
    """With auto_migrate = false the service does not start, names the command, and starts once that has been run."""
    one = Recipe("uvicorn", (), "starlette_app:app", 1)
    with service(one, database.url, auto_migrate=False) as running:
        assert running.exit_code() == 3
    assert running.log.partition("ampd.errors.MigrationConflict: ")[2].partition("\n\n")[0].splitlines()[:2] == [
        f"the schema of 127.0.0.1:{database.server.port}/{database.name} is behind: 2 migrations pending "
        "(from 1 visits)",
        "hint: run `ampd migrate` before the service starts, or set auto_migrate = true",
    ]
    assert await database.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0

    assert ampd("migrate", "--migrations", SHOP, url=database.url).returncode == 0
    with service(one, database.url, auto_migrate=False) as running:
        running.wait_for("Uvicorn running on")
        assert json.loads(running.get("/visit"))["worker"].startswith("worker ")


async def test_a_reload_applies_what_was_added(database: Database, copy: Path) -> None:
    """Under `uvicorn --reload` a migration that was added is applied when the application is loaded again."""
    recipe = Recipe("uvicorn", ("--reload",), "starlette_app:app", 1)
    with service(recipe, database.url, folder=copy) as running:
        running.wait_for(recipe.says)
        (copy / "shop" / "migrations" / "3_pages.sql").write_text("CREATE TABLE pages (x int);\n")
        (copy / "starlette_app.py").touch()
        running.wait_for(recipe.says, 2)
        assert await scenes.history(database) == [*APPLIED, (3, True, 1)]


async def test_sigterm_rolls_back_the_migration_of_a_lifespan(database: Database, copy: Path) -> None:
    """The lifespan that is cancelled by SIGTERM ends at once: nothing of the running migration is kept."""
    (copy / "shop" / "migrations" / "3_slow.sql").write_text(
        "CREATE TABLE slow (x int);\nSELECT pg_advisory_xact_lock(1, 2);\n"
    )
    async with database.connect() as other:
        await other.execute("SELECT pg_advisory_lock(1, 2)")
        with service(Recipe("uvicorn", (), "stopping_app:app", 1), database.url, folder=copy) as running:
            await scenes.waiting_for_a_lock(database, kind="advisory")  # not yet in the one before
            running.process.terminate()
            assert running.exit_code() == 3
    assert "Application startup failed. Exiting." in running.log
    assert await scenes.history(database) == APPLIED
    assert await database.fetchval("SELECT to_regclass('slow')") is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_worker_ends_at_a_signal(database: Database, number: signal.Signals, code: int) -> None:
    """The bare worker migrates, works, and ends with the code of the signal, its pool closed, without a traceback."""
    auto = {"AMP_CONFIG_METADATA_DB__AUTO_MIGRATE": "true"}
    process = start(sys.executable, "worker.py", folder=EXAMPLES, url=database.url, **auto)

    async def works() -> bool:
        there = await database.fetchval("SELECT to_regclass('visits') IS NOT NULL")
        return there and bool(await database.fetchval("SELECT count(*) FROM visits"))

    try:
        await scenes.until(works)
        process.send_signal(number)
        assert (process.communicate(timeout=scenes.GENEROUS)[1], process.returncode) == ("", code)
    finally:
        process.kill()


async def test_a_queue_and_an_orm_share_the_database(database: Database, copy: Path) -> None:
    """Procrastinate's schema is a migration; SQLAlchemy's URL is taken as it is."""
    printed = run(sys.executable, "-m", "procrastinate", "schema", "--read", folder=copy)
    (copy / "shop" / "migrations" / "3_procrastinate.sql").write_text(printed.stdout)
    ended = run(sys.executable, "procrastinate_worker.py", folder=copy, url=database.url)
    assert ended.returncode == 0, ended.stderr
    assert [tuple(row) for row in await database.fetch("SELECT status::text FROM procrastinate_jobs")] == [
        ("succeeded",)
    ]
    url = database.url.replace("postgresql:", "postgresql+asyncpg:")
    ended = run(sys.executable, "sqlalchemy_app.py", folder=copy, url=url)
    assert (ended.stdout, ended.returncode) == ("2\n", 0), ended.stderr
    assert [row[0] for row in await database.fetch("SELECT worker FROM visits ORDER BY id")] == [
        "procrastinate",
        "sqlalchemy",
    ]


def test_management_commands(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the page for Django and Flask, with a stand-in for each framework: they call `asyncio.run`."""
    said: list[str] = []

    class BaseCommand:
        stdout = types.SimpleNamespace(write=said.append)

    class Flask:
        cli = types.SimpleNamespace(command=lambda _: lambda function: function)

        def __init__(self, _: str) -> None:
            pass

    modules: dict[str, dict[str, Any]] = {name: {} for name in ("django", "django.core", "django.core.management")}
    modules |= {"django.core.management.base": {"BaseCommand": BaseCommand}, "flask": {"Flask": Flask}}
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("click.echo", lambda event: said.append(str(event)))
    monkeypatch.setenv("DATABASE_URL", database.url)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    page = (EXAMPLES / "README.md").read_text()
    django, flask = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "command"}
    exec(compile(django, "django", "exec"), names)
    names["Command"]().handle()
    assert re.fullmatch(r"\S+: applied 2 migrations in .*, now at version 2", said.pop()), said
    exec(compile(flask, "flask", "exec"), names)
    names["migrate"]()
    assert re.fullmatch(r"\S+: up to date, at version 2", said[-1]), said
    del sys.modules["shop"]


def containers(document: Any) -> list[dict[str, Any]]:
    """Return the containers of a Kubernetes manifest or of a Compose file."""
    if "services" in document:
        return list(document["services"].values())
    pod = document["spec"]["template"]["spec"]
    return [*pod.get("initContainers", ()), *pod["containers"]]


def variables(container: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a container."""
    given = container.get("env", container.get("environment", ()))
    return dict(given) if isinstance(given, dict) else {each["name"]: each["value"] for each in given}


async def test_the_commands_of_a_deployment(database: Database, ampd: Ampd, tmp_path: Path) -> None:
    """Whatever a manifest, a Compose file and a unit say to run works, with the environment that they give it."""
    secret = tmp_path / "url"
    secret.write_text(f"{database.url}\n")
    secret.chmod(0o600)
    places = {"/run/secrets/database/url": secret, "/run/secrets/url": secret, "%d/database-url": secret}
    places |= {"/app/shop/migrations": SHOP, "/opt/shop/migrations": SHOP}

    def here(text: str) -> str:
        return str(places.get(text, text))

    asked: list[tuple[str, list[str], dict[str, str]]] = []
    for file in ("job.yaml", "deployment.yaml", "compose.yaml"):
        for container in containers(msgspec.yaml.decode((EXAMPLES / "deploy" / file).read_text())):
            if container.get("command", [""])[0] == "ampd":
                asked.append((file, container["command"], variables(container)))
    unit = configparser.RawConfigParser(strict=True, comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(EXAMPLES / "deploy" / "shop-migrate.service")
    name, _, value = unit["Service"]["Environment"].partition("=")
    assert unit["Service"]["LoadCredential"].split(":")[0] == "database-url"
    asked.append(("shop-migrate.service", shlex.split(unit["Service"]["ExecStart"]), {name: value}))

    assert [file for file, *_ in asked] == ["job.yaml", "deployment.yaml", "compose.yaml", "shop-migrate.service"]
    for number, (_, command, env) in enumerate(asked):
        assert Path(command[0]).name == "ampd"
        process = ampd(*map(here, command[1:]), env={key: here(value) for key, value in env.items()})
        assert process.returncode == 0, process.stderr
        assert ("applied 2 migrations" if number == 0 else "up to date") in process.stdout
    assert await scenes.history(database) == APPLIED


def test_pods_have_no_more_rights_than_they_need() -> None:
    """Each container of a manifest runs as no particular user, on a read-only root, without capabilities."""
    for file in ("job.yaml", "deployment.yaml"):
        document = msgspec.yaml.decode((EXAMPLES / "deploy" / file).read_text())
        pod = document["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in containers(document):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


async def test_the_steps_of_a_workflow(database: Database, copy: Path, tmp_path: Path) -> None:
    """The steps of the workflow that call ampd do so in a checkout with a migration that was added on a branch."""
    jobs = msgspec.yaml.decode((EXAMPLES / "deploy" / "github.yml").read_text())["jobs"]
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")
    for command in ("init", "add shop", "commit -m shop", "update-ref refs/remotes/origin/main HEAD"):
        assert run(*git, *command.split(), folder=copy).returncode == 0
    (copy / "shop" / "migrations" / "3_pages.sql").write_text("CREATE TABLE pages (x int);\n")
    for command in ("add shop", "commit -m pages"):
        assert run(*git, *command.split(), folder=copy).returncode == 0
    env = jobs["deploy"]["env"] | {"AMP_CONFIG_METADATA_DB__URL": database.url, "GITHUB_ACTIONS": ""}
    env["PATH"] = with_ampd(tmp_path / "bin")

    def step(line: str) -> subprocess.CompletedProcess[str]:
        bash = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", line)  # as GitHub runs it
        return run(*bash, folder=copy, **env)

    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    lint, migrate, show, apply, check = (line for line in lines if not line.startswith("pip "))
    ended = step(lint)
    assert (ended.stdout, ended.returncode) == ("1 migration, nothing found\n", 0), ended.stderr
    ended = step(show)
    assert (ended.returncode, ended.stdout.count("CREATE TABLE pages")) == (0, 1), ended.stderr
    assert step(migrate).returncode == 0
    assert step(apply).returncode == 0
    assert json.loads((copy / "migration.json").read_text())["result"] == "up_to_date"
    assert step(check).returncode == 0


def test_the_page_lists_every_example() -> None:
    """README.md of the examples has a line for each file, and for no other."""
    rows = re.findall(r"^\| \[.*$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    listed = {link for row in rows for link in re.findall(r"\]\(([^)]+)\)", row)}
    there = {str(path.relative_to(EXAMPLES)) for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("deploy/*")]}
    assert listed == there
