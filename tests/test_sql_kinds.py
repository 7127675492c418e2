"""What a statement is: how it can be run, what it sets, names and leaves behind."""

import pytest

from ampd.sql.kinds import (
    IndexBuild,
    Kind,
    code_block,
    dropped_indexes,
    ends_transaction,
    index_build,
    is_concurrent,
    is_set_config,
    kind,
    mentions,
    role,
    savepoint,
    sets_transaction,
    setting,
    temporary,
)
from ampd.sql.splitter import split
from tests.sql_texts import accepted, only


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SELECT 1", Kind.TRANSACTIONAL),
        ("(SELECT 1)", Kind.TRANSACTIONAL),
        ("CREATE INDEX i ON t (a)", Kind.TRANSACTIONAL),
        ('CREATE INDEX "concurrently" ON t (a)', Kind.TRANSACTIONAL),
        ("REFRESH MATERIALIZED VIEW CONCURRENTLY v", Kind.TRANSACTIONAL),
        ("begin", Kind.BEGIN),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE", Kind.BEGIN),
        ("START /**/ TRANSACTION READ ONLY", Kind.BEGIN),
        ("COMMIT", Kind.COMMIT),
        ("END WORK", Kind.COMMIT),
        ("ROLLBACK", Kind.ROLLBACK),
        ("abort", Kind.ROLLBACK),
        ("ROLLBACK TO SAVEPOINT s", Kind.TRANSACTIONAL),
        ("ROLLBACK WORK TO s", Kind.TRANSACTIONAL),
        ("SAVEPOINT s", Kind.TRANSACTIONAL),
        ("RELEASE s", Kind.TRANSACTIONAL),
        ("PREPARE TRANSACTION 'x'", Kind.NOT_RESUMABLE),
        ("COMMIT PREPARED 'x'", Kind.NOT_RESUMABLE),
        ("ROLLBACK PREPARED 'x'", Kind.NOT_RESUMABLE),
        ("PREPARE p AS SELECT 1", Kind.TRANSACTIONAL),
        ("PREPARE transaction AS SELECT 1", Kind.TRANSACTIONAL),
        ("PREPARE transaction (int) AS SELECT 1", Kind.TRANSACTIONAL),
        ("PREPARE TRANSACTION U&'x'", Kind.NOT_RESUMABLE),
        ("CREATE UNIQUE INDEX CONCURRENTLY i ON t (a)", Kind.CREATE_INDEX_CONCURRENTLY),
        ("create index concurrently on t (a)", Kind.CREATE_INDEX_CONCURRENTLY),
        ("DROP INDEX CONCURRENTLY IF EXISTS i", Kind.DROP_INDEX_CONCURRENTLY),
        ("DROP INDEX i", Kind.TRANSACTIONAL),
        ("VACUUM", Kind.IDEMPOTENT),
        ("VACUUM (FULL) t", Kind.IDEMPOTENT),
        ("REINDEX INDEX CONCURRENTLY i", Kind.IDEMPOTENT),
        ("REINDEX (VERBOSE) TABLE CONCURRENTLY t", Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY, VERBOSE) TABLE t", Kind.IDEMPOTENT),
        ("REINDEX (VERBOSE, CONCURRENTLY true) TABLE t", Kind.IDEMPOTENT),
        ('REINDEX ("concurrently") TABLE t', Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY off, VERBOSE) TABLE t", Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY 0) TABLE t", Kind.IDEMPOTENT),
        ("REINDEX (CONCURRENTLY 'false') TABLE t", Kind.IDEMPOTENT),
        ('REINDEX TABLE "concurrently"', Kind.IDEMPOTENT),
        ("REINDEX TABLE t", Kind.IDEMPOTENT),
        ("REINDEX SCHEMA s", Kind.IDEMPOTENT),
        ("REINDEX (VERBOSE) DATABASE d", Kind.IDEMPOTENT),
        ("REINDEX SYSTEM", Kind.IDEMPOTENT),
        ("CLUSTER", Kind.IDEMPOTENT),
        ("CLUSTER VERBOSE", Kind.IDEMPOTENT),
        ("CLUSTER (VERBOSE)", Kind.IDEMPOTENT),
        ("CLUSTER VERBOSE t", Kind.IDEMPOTENT),
        ("CLUSTER (VERBOSE) t USING i", Kind.IDEMPOTENT),
        ('CLUSTER "verbose"', Kind.IDEMPOTENT),
        ("ALTER SYSTEM SET work_mem = 1", Kind.IDEMPOTENT),
        ("DISCARD ALL", Kind.IDEMPOTENT),
        ("DISCARD PLANS", Kind.SESSION),
        ("DROP DATABASE IF EXISTS d", Kind.IDEMPOTENT),
        ("DROP DATABASE d", Kind.NOT_RESUMABLE),
        ("DROP TABLESPACE IF EXISTS s", Kind.IDEMPOTENT),
        ("DROP TABLESPACE s", Kind.NOT_RESUMABLE),
        ("DROP SUBSCRIPTION s", Kind.NOT_RESUMABLE),
        ("DROP SUBSCRIPTION IF EXISTS s", Kind.IDEMPOTENT),
        ("CREATE DATABASE d", Kind.NOT_RESUMABLE),
        ("CREATE TABLESPACE s LOCATION '/x'", Kind.NOT_RESUMABLE),
        ('ALTER DATABASE "my db" SET TABLESPACE s', Kind.NOT_RESUMABLE),
        ('ALTER DATABASE U&"d" SET TABLESPACE s', Kind.NOT_RESUMABLE),
        ("ALTER DATABASE U&\"!0064\" UESCAPE '!' SET TABLESPACE s", Kind.NOT_RESUMABLE),
        ("ALTER DATABASE d WITH TABLESPACE s", Kind.NOT_RESUMABLE),
        ("alter database tablespace with tablespace = 's'", Kind.NOT_RESUMABLE),
        ('ALTER DATABASE "d d" TABLESPACE s', Kind.NOT_RESUMABLE),
        ('ALTER DATABASE d "tablespace" = s', Kind.NOT_RESUMABLE),
        ("ALTER DATABASE U&\"!0064\" UESCAPE '!' WITH TABLESPACE s", Kind.NOT_RESUMABLE),
        ("ALTER DATABASE d SET work_mem = 1", Kind.TRANSACTIONAL),
        ("ALTER DATABASE d SET default_tablespace = tablespace", Kind.TRANSACTIONAL),
        ("ALTER DATABASE tablespace WITH CONNECTION LIMIT 5", Kind.TRANSACTIONAL),
        ("ALTER DATABASE d RENAME TO tablespace", Kind.TRANSACTIONAL),
        ("ALTER DATABASE d OWNER TO tablespace", Kind.TRANSACTIONAL),
        ('ALTER DATABASE d OWNER TO "set tablespace"', Kind.TRANSACTIONAL),
        ('ALTER TABLE ONLY a.t DETACH PARTITION a."p 1" CONCURRENTLY', Kind.NOT_RESUMABLE),
        ('ALTER TABLE t * DETACH PARTITION U&"p" CONCURRENTLY', Kind.NOT_RESUMABLE),
        ("ALTER TABLE U&\"!0064\" UESCAPE '!' DETACH PARTITION p CONCURRENTLY", Kind.NOT_RESUMABLE),
        ("ALTER TABLE IF EXISTS t DETACH PARTITION p FINALIZE", Kind.TRANSACTIONAL),
        ("ALTER TABLE t DETACH PARTITION p", Kind.TRANSACTIONAL),
        ('ALTER TABLE t DETACH PARTITION "p CONCURRENTLY"', Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'host=x' PUBLICATION p", Kind.NOT_RESUMABLE),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (enabled, create_slot = true)", Kind.NOT_RESUMABLE),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (create_slot = false)", Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p, q WITH (enabled=off, connect='off')", Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (\"create_slot\" = false)", Kind.TRANSACTIONAL),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (slot_name = create_slot)", Kind.NOT_RESUMABLE),
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH (binary = false)", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s REFRESH PUBLICATION", Kind.NOT_RESUMABLE),
        ('ALTER SUBSCRIPTION U&"s" REFRESH PUBLICATION WITH (copy_data = false)', Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION p, q", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s ADD PUBLICATION p WITH (copy_data = false)", Kind.NOT_RESUMABLE),
        ('ALTER SUBSCRIPTION "S" DROP PUBLICATION p WITH (refresh)', Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION refresh WITH (refresh = on)", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION p WITH (refresh = false)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s ADD PUBLICATION p WITH (copy_data, \"refresh\" = 'off')", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s DROP PUBLICATION p WITH (refresh = 0)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s SET (failover = true)", Kind.NOT_RESUMABLE),
        ('ALTER SUBSCRIPTION s SET (binary, "failover" = false)', Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET (binary = off, two_phase = off)", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET (two_phase = true)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s SET (slot_name = failover)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s SET (binary = false)", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s DISABLE", Kind.TRANSACTIONAL),
        ("ALTER SUBSCRIPTION s RENAME TO refresh", Kind.TRANSACTIONAL),
        ("CALL p()", Kind.NOT_RESUMABLE),
        ("DO $$ BEGIN NULL; END $$", Kind.NOT_RESUMABLE),
        ("SET search_path = a", Kind.SESSION),
        ("SET SESSION AUTHORIZATION joe", Kind.SESSION),
        ("SET LOCAL lock_timeout = 1", Kind.TRANSACTIONAL),
        ("SET TRANSACTION READ ONLY", Kind.TRANSACTIONAL),
        ("SET SESSION TRANSACTION READ ONLY", Kind.TRANSACTIONAL),
        ("SET transaction_isolation = 'serializable'", Kind.TRANSACTIONAL),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", Kind.SESSION),
        ("SET CONSTRAINTS ALL DEFERRED", Kind.TRANSACTIONAL),
        ("RESET ALL", Kind.SESSION),
        ("LISTEN c", Kind.SESSION),
        ("UNLISTEN *", Kind.SESSION),
        ("LOAD 'x'", Kind.SESSION),
    ],
)
def test_kind_tells_how_a_statement_can_be_run(script: str, expected: Kind) -> None:
    """Each statement has the kind that the no-transaction runner acts on, and PostgreSQL's parser takes it."""
    assert accepted(script)
    assert kind(only(script)) is expected


def test_what_newer_servers_refuse_in_a_transaction_is_known() -> None:
    """A form that PostgreSQL's parser here does not know yet has its kind too."""
    assert kind(only("ALTER SUBSCRIPTION s REFRESH SEQUENCES")) is Kind.NOT_RESUMABLE


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE SUBSCRIPTION s CONNECTION 'c' PUBLICATION p WITH", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET PUBLICATION p WITH", Kind.NOT_RESUMABLE),
        ("ALTER SUBSCRIPTION s SET", Kind.TRANSACTIONAL),
        ("ALTER TABLE t DETACH PARTITION", Kind.TRANSACTIONAL),
        ("COPY t FROM", Kind.TRANSACTIONAL),
    ],
)
def test_a_kind_is_found_in_linear_time(script: str, expected: Kind) -> None:
    """However often the key words of a statement recur, each is looked at once; else this takes minutes."""
    tail = " ".join(script.split()[-2:])
    assert kind(only(f"{script} {f'(a = b, {tail} ' * 10_000}")) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("COMMIT", True),
        ("END TRANSACTION", True),
        ("rollback work", True),
        ("ABORT", True),
        ("PREPARE TRANSACTION 'x'", True),
        ("COMMIT AND NO CHAIN", True),
        ("COMMIT AND CHAIN", False),
        ("ROLLBACK TRANSACTION AND CHAIN", False),
        ("ROLLBACK TO s", False),
        ("ROLLBACK WORK TO SAVEPOINT s", False),
        ("COMMIT PREPARED 'x'", False),
        ("ROLLBACK PREPARED 'x'", False),
        ("PREPARE p AS SELECT 1", False),
        ("BEGIN", False),
        ("SELECT 1", False),
    ],
)
def test_ends_transaction_knows_what_leaves_no_transaction_open(script: str, expected: bool) -> None:
    """After a statement that ends its transaction none is open, which AND CHAIN and savepoints do not achieve."""
    assert accepted(script)
    assert ends_transaction(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("set /**/ transaction isolation level serializable", True),
        ("SET LOCAL TRANSACTION READ ONLY", True),
        ("SET SESSION TRANSACTION NOT DEFERRABLE", True),
        ("SET TRANSACTION SNAPSHOT '00000003-0000001B-1'", True),
        ("SET TRANSACTION READ WRITE", True),
        ("SET transaction_deferrable = on", True),
        ("SET LOCAL \"Transaction_Isolation\" TO 'repeatable read'", True),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", False),
        ("SET default_transaction_isolation = 'serializable'", False),
        ("SET CONSTRAINTS ALL DEFERRED", False),
        ("SET transaction_timeout = 1", False),
        ("BEGIN READ ONLY", False),
    ],
)
def test_sets_transaction_knows_what_must_stand_before_any_query(script: str, expected: bool) -> None:
    """Whatever sets the mode of the transaction itself is told from what sets that of others."""
    assert accepted(script)
    assert sets_transaction(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SET Search_Path = a, b", "search_path"),
        ("set session \"Work_Mem\" to '1MB'", "work_mem"),
        ("SET amp.Owner.Id = '7'", "amp.owner.id"),
        ("SET lock_timeout TO DEFAULT", "lock_timeout"),
        ("RESET statement_timeout", "statement_timeout"),
        ("RESET amp.owner", "amp.owner"),
        ("RESET ALL", "all"),
        ("SET ROLE joe", "role"),
        ("SET role = joe", "role"),
        ("RESET ROLE", "role"),
        ("SET SESSION AUTHORIZATION joe", "session_authorization"),
        ("SET SESSION SESSION AUTHORIZATION DEFAULT", "session_authorization"),
        ("SET session_authorization = joe", "session_authorization"),
        ("RESET SESSION AUTHORIZATION", "session_authorization"),
        ("SET TIME ZONE 'UTC'", "timezone"),
        ("SET SESSION TIME ZONE INTERVAL '1' HOUR", "timezone"),
        ("SET timezone = 'UTC'", "timezone"),
        ("RESET TIME ZONE", "timezone"),
        ("SET SCHEMA 'x'", "search_path"),
        ("SET NAMES 'utf8'", "client_encoding"),
        ("SET NAMES", "client_encoding"),
        ("SET XML OPTION DOCUMENT", "xmloption"),
        ("SET session = 1", "session"),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "session characteristics as transaction read only"),
        ("SET LOCAL search_path = a", None),
        ("SET TRANSACTION READ WRITE", None),
        ("SET transaction_isolation = 'serializable'", None),
        ("SET CONSTRAINTS ALL DEFERRED", None),
        ("LOAD 'x'", None),
        ("DISCARD PLANS", None),
        ("DISCARD ALL", None),
        ("SELECT set_config('search_path', 'a', false)", "search_path"),
        ("SELECT set_config('Standard_Conforming_Strings', 'on', false)", "standard_conforming_strings"),
        ("SELECT pg_catalog.set_config($a$role$a$, 'joe', 'off')", "role"),
        ("SELECT set_config(E'a.b', 'c', false)", "a.b"),
        ("SELECT set_config('search_path', 'a', true)", None),
        ("ALTER ROLE joe SET search_path = a", None),
        ("SELECT 1", None),
    ],
)
def test_setting_names_what_a_session_is_told(script: str, expected: str | None) -> None:
    """Each SET and RESET is known by the setting that it changes, however that is written."""
    assert accepted(script)
    assert setting(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE TEMP TABLE t ()", "t"),
        ("create local temporary table if not exists t as select 1", "t"),
        ("CREATE OR REPLACE TEMP VIEW v AS SELECT 1", "v"),
        ("CREATE TEMP SEQUENCE S", "s"),
        ("CREATE TABLE pg_temp.t ()", "t"),
        ("SELECT 1 INTO TEMP t", "t"),
        ("WITH a AS (SELECT 1) SELECT * INTO TEMPORARY TABLE t FROM a", "t"),
        ("CREATE TEMP TABLE t () ON COMMIT DROP", None),
        ("CREATE TABLE temp (temp int)", None),
        ("CREATE TABLE t (a text DEFAULT 'CREATE TEMP ')", None),
        ("INSERT INTO temp VALUES (1)", None),
        ("SELECT 1", None),
    ],
)
def test_what_is_temporary(script: str, expected: str | None) -> None:
    """What is made for the session alone is known by its name, since a later session would not find it."""
    assert accepted(script)
    assert temporary(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("DELETE FROM Jobs", True),
        ('DROP TABLE pg_temp."jobs"', True),
        ("DO $$BEGIN DELETE FROM jobs; END$$", True),
        ("SELECT nextval('jobs')", True),
        ('DELETE FROM "Jobs"', False),
        ("DELETE FROM jobs_2 -- jobs", False),
    ],
)
def test_what_mentions_a_name(script: str, expected: bool) -> None:
    """A name is found as the server would read it, and rather once too often than not."""
    assert accepted(script)
    assert mentions(only(script), "jobs") is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE INDEX CONCURRENTLY ON t (a)", True),
        ("DROP INDEX CONCURRENTLY i", True),
        ("REINDEX TABLE CONCURRENTLY t", True),
        ("REINDEX (CONCURRENTLY) TABLE t", True),
        ("ALTER TABLE p DETACH PARTITION c CONCURRENTLY", True),
        ("VACUUM", True),
        ("VACUUM (ANALYZE) t", True),
        ('VACUUM "full"', True),
        ("VACUUM FULL", False),
        ("VACUUM FULL t", False),
        ("VACUUM (ANALYZE, FULL) t", False),
        ("REINDEX (CONCURRENTLY false) TABLE t", False),
        ("REINDEX TABLE t", False),
        ("CLUSTER t", False),
        ("ALTER TABLE p DETACH PARTITION c", False),
        ("CREATE INDEX ON t (a)", False),
    ],
)
def test_what_waits_in_nobodys_way(script: str, expected: bool) -> None:
    """A lock that others would have to queue behind is told from one that they need not."""
    assert accepted(script)
    assert is_concurrent(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SELECT 1", None),
        ("SET ROLE Joe", "joe"),
        ("SET SESSION ROLE 'Joe' -- the owner", "Joe"),
        ('SET LOCAL ROLE "Joe B"', "Joe B"),
        ("SET role TO joe", "joe"),
        ("SET SESSION AUTHORIZATION 'joe'; SELECT 1", "joe"),
        ("SET ROLE joe; SET ROLE jim", "jim"),
        ("SET ROLE joe; RESET ALL", "joe"),
        ("SET ROLE joe; RESET ROLE", None),
        ("SET ROLE joe; SET ROLE NONE", None),
        ("SET SESSION AUTHORIZATION joe; SET SESSION AUTHORIZATION DEFAULT", None),
        ("SET roles.of = 'a'", None),
    ],
)
def test_role_names_who_runs_what_follows(script: str, expected: str | None) -> None:
    """The role that a script has last taken on is known, however it was written."""
    assert accepted(script)
    assert role(split(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SAVEPOINT a", ("SAVEPOINT", "a")),
        ('SAVEPOINT "A b"', ("SAVEPOINT", "A b")),
        ("ROLLBACK TO A", ("ROLLBACK", "a")),
        ("ROLLBACK WORK TO SAVEPOINT a", ("ROLLBACK", "a")),
        ("RELEASE a", None),
        ("ROLLBACK", None),
    ],
)
def test_savepoint_names_it(script: str, expected: tuple[str, str] | None) -> None:
    """A savepoint goes by the name that the server gives it."""
    assert accepted(script)
    assert savepoint(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("SELECT pg_catalog.set_config('search_path', '', false)", True),
        ("select /**/ SET_CONFIG ( 'a.b' , E'it\\'s; one' , FALSE ) ", True),
        ("SELECT set_config($$role$$, 'a rather long name', 'f')", True),
        ("SELECT set_config('search_path', '', true)", False),
        ("SELECT set_config('search_path', '', false), 1", False),
        ("SELECT set_config('search_path', '', false) FROM t", False),
        ("SELECT set_config('search_path', current_setting('x'), false)", False),
        ("SELECT set_config('search_path', 'a' || 'b', false)", False),
        ("SELECT set_config(name, '', false)", False),
        ("SELECT other.set_config('search_path', '', false)", False),
        ("SELECT 'set_config(1, 2, false)'", False),
        ("VALUES (set_config('search_path', '', false))", False),
    ],
)
def test_is_set_config_knows_a_setting_in_the_guise_of_a_query(script: str, expected: bool) -> None:
    """Only a lone call with literals for the session is one, which can be run again and does nothing else."""
    assert accepted(script)
    assert is_set_config(only(script)) is expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("CREATE INDEX CONCURRENTLY Idx ON Tbl (a)", IndexBuild("idx", ("tbl",))),
        ("CREATE INDEX CONCURRENTLY ON t USING gin (a)", IndexBuild(None, ("t",))),
        (
            'CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS "My ""Idx" ON ONLY "S ." . Ta/**/ (a)',
            IndexBuild('My "Idx', ("S .", "ta")),
        ),
        ('CREATE INDEX CONCURRENTLY "on" ON d.s."ON"(a)', IndexBuild("on", ("d", "s", "ON"))),
        ('CREATE INDEX CONCURRENTLY GRÖßE ON "a\nb" (x)', IndexBuild("grÖße", ("a\nb",))),
        (f"CREATE INDEX CONCURRENTLY {'ä' * 40} ON t (a)", IndexBuild("ä" * 31, ("t",))),
        ('CREATE INDEX CONCURRENTLY U&"\\0061" ON t (a)', None),
        ('CREATE INDEX CONCURRENTLY i ON U&"\\0061" (a)', None),
        ("CREATE INDEX i ON t (a)", None),
        ("SELECT 1", None),
    ],
)
def test_index_build_names_what_the_catalog_holds(script: str, expected: IndexBuild | None) -> None:
    """The index and table of a concurrent build are read as PostgreSQL folds, unquotes and cuts names."""
    assert accepted(script)
    assert index_build(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("DROP INDEX CONCURRENTLY i", (("i",),)),
        ('DROP INDEX CONCURRENTLY IF EXISTS A.i, "A . , b" RESTRICT', (("a", "i"), ("A . , b",))),
        ("DROP INDEX CONCURRENTLY x.y.z CASCADE", (("x", "y", "z"),)),
        ('DROP INDEX CONCURRENTLY U&"i"', ()),
        ("DROP INDEX i", ()),
    ],
)
def test_dropped_indexes_names_each(script: str, expected: tuple[tuple[str, ...], ...]) -> None:
    """Every index of a concurrent drop is named, part by part."""
    assert accepted(script)
    assert dropped_indexes(only(script)) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("DO $$BEGIN END$$", "BEGIN END"),
        ("SELECT 1; do /* $$ */ LANGUAGE plpgsql -- $$\n $x$ $$;$$ $x$", " $$;$$ "),
        ("DO LANGUAGE 'plpgsql' $$x$$", "x"),
        ("DO $$x$$ LANGUAGE 'plpgsql'", "x"),
        ("DO '\nBEGIN\n  EXECUTE $$x$$;\nEND'", "\nBEGIN\n  EXECUTE $$x$$;\nEND"),
        ("DO '\nx := ''a'';\n'", "\nx := ''a'';\n"),
        ("DO 'BEGIN'\n' END'", None),
        ("DO '''a'''\n' END'", None),
        ("DO E'BEGIN\\n END'", None),
        ("CREATE FUNCTION f() RETURNS int AS $$x$$", None),
        ("SELECT $$x$$", None),
    ],
)
def test_code_block_is_the_code_of_a_do(script: str, expected: str | None) -> None:
    """The code is what stands in the quotes of whichever sort, and not what a comment or another option holds."""
    assert accepted(script)
    block = code_block(split(script)[-1])
    assert (block and script[slice(*block)]) == expected
