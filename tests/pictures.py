"""docs/pictures: what the commands print, as pictures for the README.

    python -m tests.pictures FOLDER

The commands are run as a person would run them; only the database is given another name. The text of a picture is its
description as well, for whoever cannot see it, and for the test that compares it with what is printed now.
"""

import asyncio
import html
import re
import sys
import tempfile
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.conftest import start_server
from tests.folders import write
from tests.servers import Ampd, Database

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
RENEW = "make pictures"
COLUMNS = 100

FILES = {
    "1_accounts.sql": "CREATE TABLE accounts (\n    id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,\n"
    "    email text NOT NULL\n);\n"
    "INSERT INTO accounts (email) SELECT n || '@example.com' FROM generate_series(1, 50000) n;\n",
    "2_accounts_email.sql": "-- no-transaction\n"
    "CREATE UNIQUE INDEX CONCURRENTLY accounts_email ON accounts (email);\nVACUUM ANALYZE accounts;\n",
    "3_orders.sql": "CREATE TABLE orders (\n    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,\n"
    "    account bigint NOT NULL REFERENCES accounts\n);\n",
}
LATER = {
    "4_lucky_number.sql": "ALTER TABLE accounts ADD COLUMN lucky int NOT NULL DEFAULT random() * 100;\n",
    "5_order_notes.sql": "ALTER TABLE orders ADD COLUMN note text;\n",
    "6_orders_account.sql": "-- no-transaction\nCREATE INDEX CONCURRENTLY orders_account ON orders (account);\n",
}
EDITED = {"1_accounts.sql": FILES["1_accounts.sql"].replace("email text NOT NULL", "email text NOT NULL UNIQUE")}


def record(database: Database, ampd: Ampd) -> dict[str, str]:
    """Return what is printed, after the command itself, by the name of the picture."""

    def run(command: str) -> str:
        variables = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__DIR": "migrations"}
        process = ampd(*command.split(), url=database.url, env=variables)
        label = f"{database.server.host}:{database.server.port}/{database.name}"
        return f"$ ampd {command}\n{process.stderr}{process.stdout}".replace(label, "db.internal:5432/shop")

    folder = write(ampd.folder / "migrations", FILES)
    migrate = run("migrate")
    write(folder, LATER)
    status, rehearsal = run("status"), run("migrate --rehearse")
    write(folder, EDITED)
    return {"migrate": migrate, "status": status, "rehearsal": rehearsal, "conflict": run("migrate")}


_SVG = """\
<svg role="img" width="{width}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>TITLE</title>
<desc>
TEXT</desc>
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def picture(name: str, text: str) -> str:
    """Return a text as an SVG picture of a terminal."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    for number, line in enumerate(text.rstrip().split("\n")):
        for start in range(0, max(len(line), 1), COLUMNS):  # broken where a terminal breaks it
            console.print(Text(line[start : start + COLUMNS], style="bold #7ee787" if number == 0 else ""))
    title = text.partition("\n")[0].removeprefix("$ ")
    described = _SVG.replace("TITLE", _escaped(title)).replace("TEXT", _escaped(text))
    return console.export_svg(title=title, code_format=described, unique_id=f"ampd-{name}")


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("{", "{{").replace("}", "}}")


def text_of(svg: str) -> str:
    """Return the text of a picture."""
    described = re.search(r"<desc>\n(.*?)</desc>", svg, re.DOTALL)
    assert described is not None
    return html.unescape(described[1])


def _recorded_anew() -> dict[str, str]:
    with ExitStack() as stack:
        database = Database(start_server(stack), "pictures")
        asyncio.run(Database(database.server, "postgres").execute(f"CREATE DATABASE {database.name}"))
        return record(database, Ampd(Path(stack.enter_context(tempfile.TemporaryDirectory()))))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    for name, text in _recorded_anew().items():
        (Path(sys.argv[1]) / f"{name}.svg").write_text(picture(name, text), encoding="utf-8")
