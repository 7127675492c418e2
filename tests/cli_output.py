"""What the tests of the command line compare: its streams without what differs from run to run."""

import json
import re
import subprocess
from typing import Any

_VARIABLE = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d\+0000)?(?!:)", "TIME"),
    (r"\bin (\d+ ms|\d+\.\d s)", "in N s"),
    (r"(?<=TIME)  +(\d+ ms|\d+\.\d s)", "  N ms"),
    (r"(?<=TIME) {6,}", " " * 8),  # as wide as durations are
    (r"when \(UTC\) +took +by", "when  took  by"),
    (r"\b(\d+ ms|\d+\.\d s)", "N ms"),
    (r"127\.0\.0\.1:\d+/ampd_test_\w+", "DATABASE"),
)


def plain(text: str) -> str:
    """Return a text without what differs from run to run."""
    for pattern, stand_in in _VARIABLE:
        text = re.sub(pattern, stand_in, text)
    return text


def restore(path: str) -> str:
    """Return the hint for a file that was changed or is gone, with its path as a shell has it."""
    return (
        f"restore the original file (from version control: `git log --stat -- {path}`), "
        "or, where the data may be lost, reset the database and run all migrations again"
    )


def late(version: int, old: str, new: str, options: str = "") -> str:
    """Return the hint for a file that is out of order; the options are those that its command is completed by."""
    return (
        f"give the file a version above {version} (and no other change): `mv {old} {new}`; "
        "or set allow_out_of_order = true: "
        f"`AMP_CONFIG_METADATA_DB__MIGRATIONS__ALLOW_OUT_OF_ORDER=true ampd migrate{options}`; "
        "or, where the data may be lost, reset the database and run all migrations again"
    )


def seen(process: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    """Return code, stdout and stderr without what differs from run to run."""
    return process.returncode, plain(process.stdout), plain(process.stderr)


def document(process: subprocess.CompletedProcess[str]) -> Any:
    """Return the one JSON document on stdout, with its times and durations checked for form and taken out."""

    def without(pairs: list[tuple[str, object]]) -> dict[str, object]:
        for name, value in pairs:
            if name in ("applied_at", "started_at") and value is not None:
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", str(value))
            if name == "duration_ms" and value is not None:
                assert isinstance(value, int)
        moving = ("applied_at", "started_at", "duration_ms")
        return {name: "…" if name in moving and value is not None else value for name, value in pairs}

    return json.loads(process.stdout, object_pairs_hook=without)


def error(code: str, message: str, hint: str | None, **facts: object) -> dict[str, object]:
    """Return what a document holds under `error`."""
    unknown = dict.fromkeys(("version", "file", "line", "column", "sqlstate", "detail"))
    return {"code": code, "message": message, "hint": hint} | unknown | facts


def failed(problem: dict[str, object], **facts: object) -> dict[str, object]:
    """Return the document of a run that failed."""
    return {"result": "failed", "current_version": None, "applied": [], "pending": []} | facts | {"error": problem}
