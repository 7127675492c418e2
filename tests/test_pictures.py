"""What the commands print is what the pictures of README.md show."""

import re
from difflib import unified_diff

import pytest

from tests import pictures
from tests.cli_output import plain
from tests.servers import Ampd, Database
from tests.test_documents import README

pytestmark = pytest.mark.one_version


def test_the_pictures_show_what_is_printed(database: Database, ampd: Ampd) -> None:
    """Each is of a command that prints the same now, times and sizes apart, and stands in README.md."""
    printed = pictures.record(database, ampd)
    assert {path.stem for path in pictures.PICTURES.iterdir()} == set(printed)
    assert sorted(re.findall(r"docs/pictures/(\w+)\.svg", README)) == sorted(printed)
    for name, text in printed.items():
        svg = (pictures.PICTURES / f"{name}.svg").read_text(encoding="utf-8")
        shown, now = ([plain(line) for line in each.splitlines()] for each in (pictures.text_of(svg), text))
        if shown != now:
            changes = "\n".join(unified_diff(shown, now, f"docs/pictures/{name}.svg", "printed", lineterm=""))
            pytest.fail(f"a picture is not what is printed: take it anew with `{pictures.RENEW}`\n{changes}")
        assert svg == pictures.picture(name, pictures.text_of(svg))
