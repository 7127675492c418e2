"""Migration folders of a test's own."""

from collections.abc import Mapping
from pathlib import Path

TWO = {"1_first.sql": "CREATE TABLE a (id int);\n", "2_second.sql": "CREATE TABLE b (id int);\nCREATE TABLE c ();\n"}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files into a folder, made if missing, byte for byte; return the folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
