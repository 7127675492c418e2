"""Scripts that are easily misread, texts made of their pieces, and PostgreSQL's own parser as the judge."""

from itertools import pairwise

from hypothesis import strategies as st
from pglast import parser

from ampd.sql.scanner import Statement
from ampd.sql.splitter import split

NASTY = (
    "SELECT 'a;''b'; SELECT E'it\\'s;\\\\'; SELECT 'c:\\';SELECT e'\\\\';",
    "SELECT 'one;'\n  'two;' ; SELECT E'\\''\n\n'\\';' -- joined; \n ';\\'' ; SELECT 2",
    "SELECT 'a' -- c'omment;\n'b\\';SELECT E'a' -- it's\n'\\';';SELECT 3",
    "SELECT U&'d\\0061t;' , u&'!0061' UESCAPE '!', B'01' , X'1F', N'n;\\';SELECT b'1'\n'0'",
    'SELECT "a;""b", U&"\\0441;" FROM "t;"; SELECT "E\'"',
    "/* a; /* b; */ c; */ SELECT 1 /* ' */ ; /*/ ;*/ /**/ SELECT 2 /***/; SELECT 3 /* /*/**/*/ ; */",
    "-- ' ; \"\nSELECT 1 -- one;\r + 2; --;\n--\nSELECT 2--",
    "SELECT $$;$$, $a$;$b$;$$;$a$, $é_1$;$é$;$é_1$; SELECT $a$$a$; SELECT $_$ $a$_ $_$",
    "CREATE TABLE a$b$c (x$1 int, é$ë$ int); SELECT x$1 FROM a$b$c; SELECT 1",
    "PREPARE p AS SELECT $1,$2::text; SELECT $1+$$;$$; SELECT 1-$$;$$; SELECT $1",
    "SELECT 1--;\n, 2 */* ; */ 3; SELECT 4 @-/*;*/ 5; SELECT 6 +--;\n 7; SELECT '{}'::jsonb #>> '{a}' ?| ARRAY['x']",
    "CREATE RULE r AS ON INSERT TO t DO ALSO (INSERT INTO u VALUES (1); DELETE FROM v;); SELECT 1",
    "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 2 END; END; SELECT 1",
    "create or replace procedure p() begin /* ; */ atomic end; select 1",
    "CREATE FUNCTION f(a int) RETURNS int LANGUAGE sql BEGIN ATOMIC\n"
    "  SELECT t.end, t.case, t.begin, 1 AS end, 2 AS case FROM t;\n"
    "  SELECT CASE WHEN a > 0 THEN CASE a WHEN 1 THEN 2 END ELSE 3 END;\n"
    "  RETURN 1;;\nEND; SELECT 2",
    "CREATE FUNCTION f() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT 1 end; SELECT 'END;'; END; SELECT 3",
    "CREATE FUNCTION f() RETURNS xml BEGIN ATOMIC SELECT xmlelement(name end); RETURN NULL; END; SELECT 4",
    "CREATE FUNCTION begin() RETURNS int RETURN 1; BEGIN; SELECT 1; END; BEGIN WORK; COMMIT",
    "CREATE TABLE atomic (begin int, atomic int); SELECT begin, atomic FROM atomic; BEGIN; END",
    "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $f$ BEGIN PERFORM $q$;$q$; END; $f$; DO $$BEGIN NULL; END$$",
    ";;; SELECT 1 ;; /* nothing */ ; -- nothing\n;",
    "SELECT (1), ((';')), (SELECT max(x) FROM (VALUES (1), (2)) v (x)); SELECT (ARRAY[1])[1]",
    "\tSELECT\f1\v;\r\nSELECT 'é;ß', '日本;' AS \"名;\", größe FROM straße;SELECT 1",
    "SELECT 1e10, .5, 1., 0x1F, 1_000; SELECT 1.5e-3;SELECT a.b.c,a[1:2], x::int4 FROM a",
    "SELECT e, E, e.e FROM e; SELECT 1 AS e; SELECT e''",
    "SELECT ''''; SELECT ''''''; SELECT E''''; SELECT ''",
)


def assert_split_as_postgresql_does(script: str) -> None:
    """Hold our statements' starts against PostgreSQL's parser, and their ends against its scanner."""
    tokens = [token for token in parser.scan(script) if token.name not in ("SQL_COMMENT", "C_COMMENT", "ASCII_59")]
    starts = [raw.stmt_location or 0 for raw in parser.parse_sql(script)]
    expected = []
    for start, following in pairwise((*starts, len(script))):
        expected.append((start, max(token.end + 1 for token in tokens if start <= token.start < following)))
    assert [(statement.start, statement.end) for statement in split(script)] == expected


def accepted(script: str) -> bool:
    """Tell whether PostgreSQL's parser takes a script."""
    try:
        parser.parse_sql(script)
    except parser.ParseError:
        return False
    return True


def only(script: str) -> Statement:
    """Take the one statement of a script."""
    (statement,) = split(script)
    return statement


PIECES = (
    *(piece for script in NASTY for piece in script.replace(" ", "\0 \0").split("\0") if piece),
    *(
        "'",
        '"',
        "$",
        "$$",
        "$a$",
        "/*",
        "*/",
        "--",
        "\n",
        "\r",
        "\\",
        ";",
        "(",
        ")",
        "E'",
        "e",
        "U&'",
        "''",
        "BEGIN ATOMIC ",
    ),
    *(
        "SELECT 1",
        "; SELECT 2;",
        " -- x\n",
        "\n'b'",
        "CREATE FUNCTION f() ",
        " END ",
        "COPY t FROM STDIN;",
        "\\x",
        "\t",
    ),
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A real script with a few of its pieces deleted, doubled, swapped or replaced by troublemakers."""
    script = draw(st.sampled_from(NASTY)) + draw(st.sampled_from(("", ";", "\n"))) + draw(st.sampled_from(NASTY))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(script)))
        end = min(len(script), start + draw(st.integers(0, 12)))
        middle = draw(st.sampled_from(("", script[start:end] * 2, script[start:end][::-1], *PIECES)))
        script = script[:start] + middle + script[end:]
    return script


SCRIPTS = st.one_of(mutated(), st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.text())
