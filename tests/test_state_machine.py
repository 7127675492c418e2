"""Whatever a team does to its files and its runs: Hypothesis plays it out against the contract's table of conflicts.

Each game has a folder and a schema of its own. The model knows the files and the history, and says what the contract
wants; ampd runs for real, on a pool that all games share. Every migration writes its identity into a ledger, so that
one which ran twice, or in part, or not at all, is seen.
"""

import asyncio
import itertools
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ampd
from ampd.plan import State
from tests.repetition import TIMES
from tests.scenes import Heard
from tests.servers import Database

GAMES, MOVES = 3 * TIMES, 25
LONGEST_MOVE_SECS = 30  # a move that takes longer hangs
NEW_FILES = st.lists(st.tuples(st.sampled_from([False] * 9 + [True]), st.booleans()), max_size=3)
TAMPERINGS = [
    "edit",
    "break",
    "delete",
    "check out an older build",
    "switch to another branch",
    "rename",
    "move",
    "insert",
]

LEFT_OVER = """
    SELECT 'lock', pid FROM pg_locks JOIN pg_database d ON d.oid = database
    WHERE locktype = 'advisory' AND datname = current_database()
    UNION ALL
    SELECT state, pid FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database()
"""


class File(msgspec.Struct, frozen=True):
    """A migration file; `identity` never changes, `edition` is how it begins, `broken` how it ends."""

    version: int
    name: str
    identity: int
    edition: int = 0
    broken: bool = False
    no_transaction: bool = False

    def path(self, folder: Path) -> Path:
        """Return where it lies."""
        return folder / f"{self.version}_{self.name}.sql"

    def text(self) -> str:
        """Return what it says: a line for the ledger, a table, and an end that may fail or be interrupted."""
        end = f"CREATE INDEX CONCURRENTLY m{self.identity}_i ON m{self.identity} (id);" if self.no_transaction else ""
        return (
            f"{'-- no-transaction' if self.no_transaction else '--'}\n"
            f"INSERT INTO public.ledger VALUES (current_schema(), {self.identity} /* edition {self.edition} */);\n"
            f"CREATE TABLE m{self.identity} (id int);\n"
            f"{'SELECT 1 / 0;' if self.broken else end}\n"
        )


class Row(msgspec.Struct, frozen=True):
    """What the history should remember of a migration; of an unfinished one how far it came, and if it was killed."""

    file: File
    finished: bool = True
    done: int = 0
    killed: bool = False
    written: File | None = None  # the file as it was when the row was written, where it was resumed with another since


class Expectation(msgspec.Struct, frozen=True):
    """What the contract wants of the files and the history as they are."""

    states: dict[int, State]
    pending: tuple[int, ...]
    conflicts: dict[int, State]
    ahead: bool
    another: bool  # it is another project's history, and the rest is not looked at


def expect(files: dict[int, File], rows: dict[int, Row], *, out_of_order: bool) -> Expectation:
    """Return what the contract's table says, in its own words and order."""
    newest_file, newest_row = max(files, default=-1), max(rows, default=-1)
    states: dict[int, State] = {}
    for version in sorted(files.keys() | rows.keys()):
        file, row = files.get(version), rows.get(version)
        if row is None:
            late = version < newest_row and not out_of_order
            states[version] = State.OUT_OF_ORDER if late else State.PENDING
        elif file is None and version > newest_file:
            states[version] = State.AHEAD  # finished or not: it is for the newer build to finish
        elif not row.finished:
            states[version] = State.INTERRUPTED
        elif file is None:
            states[version] = State.MISSING
        else:
            same = (file.identity, file.edition, file.broken) == (row.file.identity, row.file.edition, row.file.broken)
            states[version] = State.APPLIED if same else State.CHANGED
    ahead = State.AHEAD in states.values()
    resumed = {
        version
        for version, row in rows.items()
        if not row.finished and not ahead and (file := files.get(version)) is not None and provably_safe(file, row)
    }
    pending = tuple(v for v, state in states.items() if v in resumed or (state is State.PENDING and not ahead))
    harmless = (State.APPLIED, State.PENDING, State.AHEAD)
    conflicts = {v: state for v, state in states.items() if state not in harmless and v not in resumed}
    named = {(file.version, file.name) for file in files.values()}
    texts = {file.text() for file in files.values()}
    written = [(version, row.written or row.file) for version, row in rows.items()]
    ours = [file for version, file in written if (version, file.name) in named or file.text() in texts]
    return Expectation(states, pending, conflicts, ahead, another=bool(files and rows and not ours))


def provably_safe(file: File, row: Row) -> bool:
    """Tell whether an interrupted migration may be resumed: nothing that was done or begun has been edited."""
    if row.done == 0:
        return True
    head = (file.identity, file.edition) == (row.file.identity, row.file.edition)
    return head and (file.broken == row.file.broken or not row.killed)


class Outcome(msgspec.Struct, frozen=True):
    """What a run came to, told by itself."""

    applied: tuple[int, ...]
    error: BaseException | None
    told: tuple[int, ...]  # by its events
    warned: bool  # of a database that is ahead


class Table:
    """What the games share: a database, a pool that stays open from one to the next, and an event loop."""

    def __init__(self, database: Database, portal: BlockingPortal) -> None:
        self._database = database
        self.url = ampd.DatabaseUrl(database.url)
        self._portal = portal
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []  # of the driver, over connections that come back in the middle of something

    def open(self) -> None:
        """Connect."""
        self.pool: asyncpg.Pool = self.run(self._open)

    def _hear(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context["message"].startswith("Resetting connection with an active transaction"):
            self.complaints.append(context["message"])

    async def _open(self) -> asyncpg.Pool:
        asyncio.get_running_loop().set_exception_handler(self._hear)
        await self._database.execute("CREATE TABLE ledger (schema text NOT NULL, identity int NOT NULL)")
        return await asyncpg.create_pool(self._database.url, min_size=0, max_size=6)

    def close(self) -> None:
        """Disconnect."""
        self.run(self.pool.close)

    def number(self) -> int:
        """Return a number that nothing else has."""
        return next(self._numbers)

    def run(self, function: Any, *arguments: Any) -> Any:
        """Run a coroutine function in the event loop, to its end."""

        async def in_time() -> Any:
            with anyio.fail_after(LONGEST_MOVE_SECS):
                return await function(*arguments)

        return self._portal.call(in_time)


class Game(RuleBasedStateMachine):
    """One folder, one schema, and the people and machines at work on them."""

    table: Table

    @initialize(out_of_order=st.booleans(), new=NEW_FILES)
    def begin(self, out_of_order: bool, new: list[tuple[bool, bool]]) -> None:
        """Begin with some files and an empty database."""
        self.files: dict[int, File] = {}
        self.rows: dict[int, Row] = {}
        self.schema = f"game_{self.table.number()}"
        self.folder = Path(tempfile.mkdtemp(prefix="ampd-game-"))
        self.out_of_order = out_of_order
        self.limits = ampd.Limits(connect_wait_secs=0, advisory_lock_wait_secs=LONGEST_MOVE_SECS)
        self.release(new)

    def teardown(self) -> None:
        """Leave nothing, and see that the runs have left nothing either."""
        shutil.rmtree(self.folder)
        self.table.run(self._reset)
        assert self.table.run(self._fetch, LEFT_OVER) == []
        assert self.table.complaints == []

    # What people do to the files.

    def release(self, new: list[tuple[bool, bool]]) -> None:
        """Write new files, above all others, with room between them."""
        for broken, no_transaction in new:
            version = max([*self.files, *self.rows], default=0) + 2
            self._write(File(version, "new", self.table.number(), broken=broken, no_transaction=no_transaction))

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 9), how=st.sampled_from(TAMPERINGS))
    def tamper(self, which: int, how: str) -> None:
        """Do something to a file that may have been applied: most of it is what one should not do."""
        file = sorted(self.files.values(), key=lambda file: file.version)[which % len(self.files)]
        match how:
            case "edit":
                self._replace(file, edition=file.edition + 1)
            case "break" if not self._was_killed(file.version):
                self._replace(file, broken=True)
            case "delete":
                self._delete(file.version)
            case "check out an older build":
                self._delete(max(self.files))
            case "switch to another branch":
                newest = self._delete(max(self.files))
                if newest.version and newest.version - 1 not in self.files:
                    self._write(File(newest.version - 1, "late", self.table.number()))
            case "rename":
                self._replace(file, name=f"{file.name}er")
            case "move" if file.version + 1 not in self.files:
                self._replace(file, version=file.version + 1)
            case "insert" if file.version and file.version - 1 not in self.files:
                self._write(File(file.version - 1, "late", self.table.number()))

    @rule(advice=st.sampled_from(["restore", "mend", "restore", "mend", "reset"]))
    def take_advice(self, advice: str) -> None:
        """Restore the original files, mend those that fail, or reset the database."""
        match advice:
            case "restore":
                originals = {row.file.identity for row in self.rows.values()}
                for version, file in list(self.files.items()):
                    if version in self.rows or file.identity in originals:
                        self._delete(version)
                for row in self.rows.values():
                    self._write(row.file)
            case "mend":
                for file in list(self.files.values()):
                    if file.broken and not self._was_killed(file.version):
                        self._replace(file, broken=False)
            case "reset":
                self.table.run(self._reset)
                self.rows.clear()

    # What ampd does.

    @rule(new=NEW_FILES)
    def migrate(self, new: list[tuple[bool, bool]]) -> None:
        """Migrate alone."""
        self.release(new)
        expected = self._expected()
        applied, failing = self._course(expected)
        self._check(expected, self.table.run(self._run), applied, failing)
        self._remember(applied, failing)

    @rule(runners=st.integers(2, 3), new=NEW_FILES)
    def race(self, runners: int, new: list[tuple[bool, bool]]) -> None:
        """Migrate several times at once: between them they do what one would do alone."""
        self.release(new)
        expected = self._expected()
        applied, failing = self._course(expected)
        outcomes = self.table.run(self._race, runners)
        for outcome in outcomes:
            self._check(expected, outcome, None, failing)
        assert sorted(version for outcome in outcomes for version in outcome.applied) == sorted(applied)
        self._remember(applied, failing)

    @rule(
        events=st.integers(1, 9),
        delay=st.sampled_from([None, 0.0, 0.0005, 0.001, 0.002, 0.005]),
        scope=st.booleans(),
        new=NEW_FILES,
    )
    def kill(self, events: int, delay: float | None, scope: bool, new: list[tuple[bool, bool]]) -> None:
        """Cancel a run, at an event or some time after it: what it says it has applied is applied, and nothing else."""
        self.release(new)
        expected = self._expected()
        applied, failing = self._course(expected)
        outcome = self.table.run(self._run, events, delay, scope)
        if not isinstance(outcome.error, asyncio.CancelledError):
            self._check(expected, outcome, applied, failing)
            self._remember(applied, failing)
            return
        note(f"killed; it had applied {outcome.told}")
        assert outcome.told == applied[: len(outcome.told)]
        self._remember(outcome.told, None)
        history = self.table.run(self._history)
        unfinished = {version: row["statements_done"] for version, row in history.items() if not row["finished"]}
        for version in unfinished.keys() - self.rows.keys():
            assert version == expected.pending[len(outcome.told)]
            assert self.files[version].no_transaction
        for version in unfinished.keys() & set(expected.pending):
            self.rows[version] = self._unfinished_row(version, done=unfinished[version], killed=True)

    @rule(resolution=st.sampled_from(list(ampd.Resolution)))
    def resolve(self, resolution: ampd.Resolution) -> None:
        """Finish or undo an interrupted migration by hand and say so; nothing else can be resolved."""
        if self._expected().another:
            for version in self.files.keys() | self.rows.keys():
                assert isinstance(self.table.run(self._resolve, version, resolution), ampd.MigrationConflict)
            return
        for version in (self.files.keys() | self.rows.keys() | {99}) - self._unfinished():
            assert isinstance(self.table.run(self._resolve, version, resolution), ampd.ConfigError)
        for version in self._unfinished():
            self._settle(version, self.rows[version], resolution)

    def _settle(self, version: int, row: Row, resolution: ampd.Resolution) -> None:
        settled = self.files.get(version, row.file) if resolution is ampd.Resolution.APPLIED else None
        if settled and settled.name != row.file.name and settled.text() != row.file.text():
            assert isinstance(self.table.run(self._resolve, version, resolution), ampd.ConfigError)
            return
        self.table.run(self._by_hand, row.file, settled)
        assert self.table.run(self._resolve, version, resolution) is None
        if settled:
            self.rows[version] = Row(settled)
        else:
            del self.rows[version]

    @invariant()
    def the_database_is_as_the_model_has_it(self) -> None:
        """The history has each row that it should, and the ledger shows each migration once."""
        history = self.table.run(self._history)
        assert {
            version: row["checksum"] if row["finished"] else row["statements_done"] for version, row in history.items()
        } == {
            version: sha256(row.file.text().encode()).digest() if row.finished else row.done
            for version, row in self.rows.items()
        }
        ledger = self.table.run(self._fetch, "SELECT identity FROM ledger WHERE schema = $1", self.schema)
        assert sorted(identity for (identity,) in ledger) == sorted(
            row.file.identity for row in self.rows.values() if row.finished or row.done
        )

    @invariant()
    def the_plan_is_as_the_contract_wants_it(self) -> None:
        """`status` tells each version's state, and what `migrate` would do about it."""
        expected = self._expected()
        if expected.another:
            with pytest.raises(ampd.MigrationConflict, match="is the history of another project"):
                self.table.run(self._status)
            return
        found = self.table.run(self._status)
        assert {step.version: step.state for step in found.plan.migrations} == expected.states
        assert tuple(step.version for step in found.plan.pending) == expected.pending
        assert {conflict.version: conflict.info.state for conflict in found.plan.conflicts} == expected.conflicts
        assert found.up_to_date == (set(expected.states.values()) <= {State.APPLIED})
        assert found.current_version == max((v for v, row in self.rows.items() if row.finished), default=None)

    # How the model goes on.

    def _expected(self) -> Expectation:
        expected = expect(self.files, self.rows, out_of_order=self.out_of_order)
        note(f"expected: {expected}")
        return expected

    def _course(self, expected: Expectation) -> tuple[tuple[int, ...], int | None]:
        """Return what a run should apply, and where it should fail."""
        if expected.conflicts or expected.another:
            return (), None
        failing = next((version for version in expected.pending if self.files[version].broken), None)
        return tuple(version for version in expected.pending if failing is None or version < failing), failing

    def _check(
        self, expected: Expectation, outcome: Outcome, applied: tuple[int, ...] | None, failing: int | None
    ) -> None:
        match outcome.error:
            case ampd.MigrationConflict() if expected.another:
                assert outcome.error.conflicts == ()
            case ampd.MigrationConflict():
                interrupted = set(expected.conflicts.values()) == {State.INTERRUPTED}
                assert {each.version: each.info.state for each in outcome.error.conflicts} == expected.conflicts
                assert isinstance(outcome.error, ampd.MigrationInterrupted) == interrupted
            case ampd.MigrationFailed():
                assert outcome.error.version == failing
            case _:
                assert (outcome.error, expected.another, expected.conflicts, failing) == (None, False, {}, None)
        assert outcome.told == outcome.applied
        assert outcome.warned == (expected.ahead and not expected.conflicts and not expected.another)
        assert applied is None or outcome.applied == applied

    def _remember(self, applied: tuple[int, ...], failing: int | None) -> None:
        self.rows |= {version: Row(self.files[version]) for version in applied}
        if failing is not None and self.files[failing].no_transaction:
            self.rows[failing] = self._unfinished_row(failing, done=2)

    def _unfinished_row(self, version: int, *, done: int, killed: bool = False) -> Row:
        before = self.rows.get(version)
        written = (before.written or before.file) if before else None
        return Row(self.files[version], finished=False, done=done, killed=killed, written=written)

    def _was_killed(self, version: int) -> bool:
        """Tell whether a file had better not be changed at its end: nobody knows if that was begun."""
        row = self.rows.get(version)
        return row is not None and not row.finished and row.killed

    def _unfinished(self) -> set[int]:
        return {version for version, row in self.rows.items() if not row.finished}

    def _replace(self, file: File, **changes: Any) -> None:
        self._delete(file.version)
        self._write(msgspec.structs.replace(file, **changes))

    def _write(self, file: File) -> None:
        self.files[file.version] = file
        file.path(self.folder).write_text(file.text())

    def _delete(self, version: int) -> File:
        file = self.files.pop(version)
        file.path(self.folder).unlink()
        return file

    # How it is done; all of this in the event loop.

    @property
    def _database(self) -> asyncpg.Pool | ampd.MetadataDb:
        """The pool, or a configuration of the same database where the order does not matter."""
        if not self.out_of_order:
            return self.table.pool
        return ampd.MetadataDb(url=self.table.url, migrations=ampd.Migrations(allow_out_of_order=True))

    @property
    def _arguments(self) -> dict[str, Any]:
        files = ampd.read_migrations(self.folder) if self.files else ()  # none at all can only be given from code
        return {"migrations": files, "schema": self.schema, "limits": self.limits}

    async def _run(self, events: int = 0, delay: float | None = None, scope: bool = False) -> Outcome:
        """Migrate; stop it at the given number of events, or some seconds later."""
        told = Heard()
        loop = asyncio.get_running_loop()
        cancel_scope = anyio.CancelScope()

        async def migrate() -> ampd.Report:
            with cancel_scope:
                return await ampd.migrate(self._database, on_event=listen, **self._arguments)
            raise asyncio.CancelledError

        def listen(event: ampd.Event) -> None:
            told(event)
            if len(told) == events:
                stop = cancel_scope.cancel if scope else run.cancel
                loop.call_later(delay, stop) if delay is not None else stop()

        run = asyncio.create_task(migrate())
        await asyncio.wait([run])
        told.assert_adds_up()
        error = asyncio.CancelledError() if run.cancelled() else run.exception()
        report = run.result() if error is None else getattr(error, "report", None)
        return Outcome(
            applied=tuple(done.version for done in report.applied) if report else (),
            error=error,
            told=tuple(event.version for event in told if isinstance(event, ampd.Applied)),
            warned=any(isinstance(event, ampd.Warned) and "is ahead of this build" in event.message for event in told),
        )

    async def _race(self, runners: int) -> list[Outcome]:
        return await asyncio.gather(*(self._run() for _ in range(runners)))

    async def _status(self) -> ampd.Status:
        return await ampd.status(self._database, **self._arguments)

    async def _resolve(self, version: int, resolution: ampd.Resolution) -> ampd.AmpdError | None:
        try:
            await ampd.resolve(self._database, version, resolution, **self._arguments)
        except (ampd.ConfigError, ampd.MigrationConflict) as error:
            return error
        return None

    async def _by_hand(self, old: File, new: File | None) -> None:
        """Undo what an interrupted migration has done, and do what another one would."""
        await self.table.pool.execute(f"DROP TABLE IF EXISTS {self.schema}.m{old.identity}")
        await self.table.pool.execute(
            "DELETE FROM ledger WHERE schema = $1 AND identity = $2", self.schema, old.identity
        )
        if new:
            await self.table.pool.execute("INSERT INTO ledger VALUES ($1, $2)", self.schema, new.identity)

    async def _reset(self) -> None:
        await self.table.pool.execute(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE")
        await self.table.pool.execute("DELETE FROM ledger WHERE schema = $1", self.schema)

    async def _fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self.table.pool.fetch(query, *arguments)
        return rows

    async def _history(self) -> dict[int, asyncpg.Record]:
        table = f"{self.schema}.ampd_schema_migrations"
        if await self.table.pool.fetchval("SELECT to_regclass($1)", table) is None:
            return {}
        query = f"SELECT version, checksum, statements_done, finished_at IS NOT NULL AS finished FROM {table}"
        return {row["version"]: row for row in await self.table.pool.fetch(query)}


@pytest.mark.one_version
def test_files_and_runs_in_any_order(database: Database) -> None:
    """Whatever is done to the files, by however many and however rudely, the contract's table says what comes of it."""
    with start_blocking_portal() as portal:
        table = Table(database, portal)
        table.open()
        try:
            run_state_machine_as_test(
                type("GameAtTheTable", (Game,), {"table": table}),
                settings=settings(
                    max_examples=GAMES,
                    stateful_step_count=MOVES,
                    deadline=None,
                    derandomize=TIMES == 1,
                    phases=[Phase.reuse, Phase.generate],  # what depends on the moment of a kill does not shrink
                    report_multiple_bugs=False,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            table.close()
