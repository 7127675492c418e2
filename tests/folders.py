"""Folders of a test's own: of migrations, and in memory."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

_MEMORY = Path("/dev/shm")  # where Linux has it: making a database takes a tenth of the time, and a cluster half
_ENOUGH = 3 * 2**30  # bytes: WAL, and a few databases per worker

TWO = {"1_first.sql": "CREATE TABLE a (id int);\n", "2_second.sql": "CREATE TABLE b (id int);\nCREATE TABLE c ();\n"}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files into a folder, made if missing, byte for byte; return the folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def memory() -> Path | None:
    """Return where the data of servers are to be: in memory if there is enough, else wherever files are temporary."""
    usable = os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free > _ENOUGH
    return _MEMORY if usable else None
