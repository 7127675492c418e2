"""What goes to the server is what docs/sql.md shows."""

from difflib import unified_diff

import pytest

from tests import sql_page
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]


async def test_the_page_shows_what_is_sent(database: Database) -> None:
    """Every message of a run is of a kind that docs/sql.md explains, and the first of each kind is shown as it is."""
    sent = sql_page.page(await sql_page.record(database)).splitlines()
    shown = sql_page.PAGE.read_text(encoding="utf-8").splitlines()
    if sent != shown:
        changes = "\n".join(unified_diff(shown, sent, "docs/sql.md", "what is sent", n=1, lineterm=""))
        pytest.fail(f"docs/sql.md does not show what is sent: write it anew with `{sql_page.RENEW}`\n{changes}")
