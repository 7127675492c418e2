"""Reading a script token by token: nothing is lost, nothing crashes, and time and memory stay small."""

import pytest
from hypothesis import example, given

from ampd.sql import scanner, splitter
from ampd.sql.checks import problems
from ampd.sql.kinds import (
    code_block,
    dropped_indexes,
    index_build,
    is_concurrent,
    is_set_config,
    kind,
    mentions,
    role,
    savepoint,
    setting,
    temporary,
)
from ampd.sql.location import excerpt, locate
from ampd.sql.splitter import split
from tests.repetition import examples
from tests.sql_texts import SCRIPTS, only


def test_words_fold_like_keywords() -> None:
    """Only ASCII letters fold, so a look-alike letter never makes a keyword."""
    assert only("\u017fet beg\u0131n x").words == ("\u017fET", "BEG\u0131N", "X")
    assert only("straße é").words == ("STRAßE", "é")


@given(SCRIPTS)
@examples(150)
@example("\ud800'\udfff;")
def test_no_character_is_lost(script: str) -> None:
    """Gaps and statements put together give the script again, and no gap holds a statement."""
    statements = split(script)
    gaps, position = [], 0
    for statement in statements:
        gaps.append(script[position : statement.start])
        position = statement.end
        assert statement.text == script[statement.start : statement.end] != ""
        assert statement.line == locate(script, statement.start)[0]
    gaps.append(script[position:])
    joined = "".join(gap + statement.text for gap, statement in zip(gaps, statements, strict=False)) + gaps[-1]
    assert joined == script
    assert [split(gap) for gap in gaps] == [()] * len(gaps)


@given(SCRIPTS)
@examples(150)
def test_nothing_crashes(script: str) -> None:
    """Whatever the text, it is judged without an exception and in order of position."""
    for statement in split(script):
        kind(statement)
        index_build(statement)
        dropped_indexes(statement)
        setting(statement)
        is_set_config(statement)
        is_concurrent(statement)
        role([statement])
        mentions(statement, temporary(statement) or "a")
        savepoint(statement)
        code_block(statement)
    for transactional in (True, False):
        found = problems(script, transactional=transactional)
        assert found == problems(script, transactional=transactional, statements=split(script))
        assert [each.offset for each in found] == sorted(each.offset for each in found)
        for each in found:
            assert excerpt(script, each.offset, file="f").startswith("f:")
            assert (each.line, each.column) == locate(script, each.offset)


@given(SCRIPTS)
@examples(150)
def test_token_by_token_or_in_larger_pieces_a_script_is_the_same(script: str) -> None:
    """The scanner that takes much of a script at once finds the same statements and the same problems."""
    at_once = split(script), problems(script, transactional=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitter, "coarse_tokens", scanner.tokenize)
        assert (split(script), problems(script, transactional=True)) == at_once
