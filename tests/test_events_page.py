"""The recipes of docs/events.md are run."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

import ampd
from tests.scenes import scripts
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

PAGE = (Path(__file__).parent.parent / "docs" / "events.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("recipe", RECIPES, ids=["both", "structlog", "rich"])
async def test_a_recipe(
    database: Database, recipe: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It migrates, and what it is for sees the events."""
    caplog.set_level("INFO", "ampd")
    names: dict[str, Any] = {"url": database.url, "migrations": scripts("SELECT 1", "SELECT 2")}
    with capture_logs() as logs:
        work = eval(compile(recipe, "docs/events.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        assert inspect.iscoroutine(work)
        await work
    assert (await ampd.status(database.url, migrations=names["migrations"])).up_to_date
    seen = (caplog.messages, [each["event"] for each in logs], capsys.readouterr().out)
    assert sum("[2/2] 2 step  " in "".join(each) or "100%" in each for each in seen) == 1
