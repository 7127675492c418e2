"""What the pages of docs/ show runs: files, commands, SQL and Python."""

import ast
import json
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import msgspec
import pytest

import ampd
from tests import scenes
from tests.servers import Database
from tests.services import Recipe, environment, service, with_ampd

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "examples" / "README.md"])
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("pip ", "python3 -m venv", "mkdir ", "docker ", "kubectl ")  # what a test leaves to the stranger


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return language, title and text of each block of a page of docs/."""
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


@pytest.mark.anyio
@pytest.mark.one_version
async def test_start_here(database: Database, tmp_path: Path) -> None:
    """The stranger's path: its files, and its commands in their order, but for what fetches and deploys."""
    env = environment("", PYTHONPATH=str(tmp_path), PATH=with_ampd(tmp_path / "bin"))
    env["AMPD_TEST_URL"] = database.server.url()
    run: list[str] = []
    for language, title, text in blocks("start.md"):
        if title == "job.yaml":
            assert text == (ROOT / "examples" / "deploy" / title).read_text()
        if title:
            (tmp_path / title).parent.mkdir(exist_ok=True)
            (tmp_path / title).write_text(text)
        for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE) if language == "console" else ():
            if line.startswith(ELSEWHERE) or line.endswith("ampd solo"):
                continue
            run.append(line.split()[0])
            if assigned := re.match(r"export (\w+)=(\S+)", line):
                env[assigned[1]] = database.url if "…" in assigned[2] else assigned[2].strip("'")
            elif uvicorn := re.search(r"uvicorn (.*) (\S+)$", line):
                recipe = Recipe("uvicorn", tuple(uvicorn[1].split()), uvicorn[2], 4)
                with service(recipe, database.url, folder=tmp_path) as running:
                    running.wait_for(recipe.says, recipe.workers)
                    assert running.get("/visit/home") == "1"
            elif not line.startswith("curl"):
                bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", line]
                ended = execute(bash, tmp_path, env)
                assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"
    assert {"ampd", "pytest", "curl", "export"} <= set(run)
    assert await scenes.history(database) == [(1, True, 1), (2, True, 1), (3, True, 1)]


def execute(command: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, check=False, cwd=folder, env=env, capture_output=True, text=True, timeout=180)


@pytest.mark.anyio
async def test_the_migrations_of_the_page_for_their_writers(database: Database, tmp_path: Path) -> None:
    """They can be applied one after the other, each under its name, without a warning."""
    for _, title, text in blocks("migrations.md"):
        if title.endswith(".sql"):
            (tmp_path / title).write_text(text)
    heard = scenes.Heard()
    await ampd.migrate(database.url, migrations=ampd.read_migrations(tmp_path), on_event=heard)
    assert heard.of(ampd.Warned) == []
    assert [version for version, *_ in await scenes.history(database)] == list(range(1, 11))
    assert await database.fetchval("SELECT count(*) FROM orders WHERE cents = total * 100") == 10000


@pytest.mark.anyio
async def test_the_rights_of_the_page_for_operators(database: Database) -> None:
    """With these roles one migrates and another serves, who can read the history and not write it."""
    (sql,) = (text for language, _, text in blocks("operators.md") if language == "sql")
    await database.execute(re.sub(r"\bshop(?=_owner|_migrator| LOGIN|;)", f"{database.name}_shop", sql))
    owner, migrator, server = (f"{database.name}_shop{suffix}" for suffix in ("_owner", "_migrator", ""))
    files = scenes.scripts(f"CREATE TABLE t (x int); GRANT INSERT ON t TO {server};")

    def configured(user: str) -> ampd.MetadataDb:
        url = ampd.DatabaseUrl(database.server.url(database.name, user))
        return ampd.MetadataDb(url=url, schema="shop", migrations=ampd.Migrations(role=owner))

    await ampd.migrate(configured(migrator), migrations=files)
    assert (await ampd.status(configured(server), migrations=files)).ready
    query = "SELECT has_table_privilege($1, 'shop.ampd_schema_migrations', 'INSERT, UPDATE, DELETE')"
    assert not await database.fetchval(query, server)
    async with database.connect(database.server.url(database.name, server)) as connection:
        await connection.execute("INSERT INTO shop.t VALUES (1)")


@pytest.mark.anyio
async def test_the_json_of_status(database: Database) -> None:
    """The document of the page has keys of the real one."""
    await ampd.migrate(database.url, migrations=scenes.scripts("SELECT 1;"))
    real = json.loads((await ampd.status(database.url, migrations=scenes.scripts("SELECT 1;", "SELECT 2;"))).json())
    shown = next(json.loads(text) for _, _, text in blocks("json.md") if '"up_to_date"' in text)
    assert shown.keys() == real.keys()
    assert shown["migrations"][0].keys() <= real["migrations"][0].keys()
    assert shown["result"] == real["result"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_block_is_what_it_says(page: Path) -> None:
    """Python compiles, configurations and documents can be read, and the command line takes what is typed."""
    app = import_module("ampd.cli.commands").app

    for language, _, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(text, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        elif language == "toml":
            msgspec.toml.decode(text)
        elif language == "yaml":
            msgspec.yaml.decode(text)
        elif language == "json":
            json.loads(text)
        elif language == "console":
            for typed in re.findall(r"^\$ (?:\w+=\S* )*ampd((?: .*)?)$", text, re.MULTILINE):
                command, *_ = re.split(r" [|>#&]", typed)
                app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)


def test_the_reference_has_every_public_name() -> None:
    """docs/api.md has each name, once, and no other."""
    listed = re.findall(r"^::: ampd\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({*ampd.__all__} - {"__version__"})


def test_every_page_can_be_reached() -> None:
    """The navigation of the site has each page of docs/, and no other."""
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("docs/*.md"))
