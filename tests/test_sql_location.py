"""Where in a file something stands, and its excerpt."""

import pytest

from ampd.sql.location import excerpt, locate


@pytest.mark.parametrize(
    ("offset", "expected"),
    [(-1, (1, 1)), (0, (1, 1)), (2, (1, 3)), (3, (2, 1)), (5, (3, 1)), (6, (3, 2)), (99, (3, 2))],
)
def test_locate_counts_from_one(offset: int, expected: tuple[int, int]) -> None:
    """Lines and columns count from 1, and an offset outside the script is the nearest one inside."""
    assert locate("ab\n\r\nc", offset) == expected


@pytest.mark.parametrize(
    ("script", "offset", "expected"),
    [
        (
            "a;\n" * 13 + "ALTER TABLE jobs ADD;\nb",
            39 + 12,
            "14:13\n   |\n14 | ALTER TABLE jobs ADD;\n   |             ^",
        ),
        ("\tx\ty", 3, "1:4\n  |\n1 |     x    y\n  |          ^"),
        ("'日本' é e\u0301 x;", 10, "1:11\n  |\n1 | '日本' é e\u0301 x;\n  |            ^"),
        ("SELECT 1,\r\n  \n\n", 15, "1:10\n  |\n1 | SELECT 1,\n  |          ^"),
        ("", 0, "1:1\n  |\n1 | \n  | ^"),
        ("\x1b[31m x\xa0y", 6, "1:7\n  |\n1 | �[31m x�y\n  |       ^"),
        ("1" * 60 + "X" + "2" * 140, 60, f"1:61\n  |\n1 | …{'1' * 50}X{'2' * 49}…\n  | {' ' * 51}^"),
        ("中" * 60 + "X" + "文" * 60, 60, f"1:61\n  |\n1 | …{'中' * 25}X{'文' * 24}…\n  | {' ' * 51}^"),
        ("中" * 50, 49, f"1:50\n  |\n1 | {'中' * 50}\n  | {' ' * 98}^"),
        ("中" * 51, 51, f"1:52\n  |\n1 | …{'中' * 50}\n  | {' ' * 101}^"),
        ("X" + "2" * 140, 0, f"1:1\n  |\n1 | X{'2' * 99}…\n  | ^"),
        ("1" * 140 + "X", 140, f"1:141\n  |\n1 | …{'1' * 99}X\n  | {' ' * 100}^"),
    ],
)
def test_excerpt_puts_the_caret_under_the_offset(script: str, offset: int, expected: str) -> None:
    """The caret stands under its character despite tabs, wide and odd characters, and long lines."""
    assert excerpt(script, offset, file="m/1_x.sql") == f"m/1_x.sql:{expected}"
