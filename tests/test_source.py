"""Where migrations come from: a folder read once, and everything that is wrong with it said at once."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ampd
from ampd import InvalidMigration, Migration, read_migrations
from ampd.migration import checksum
from ampd.source import reading

NAMING = (
    "a migration file is named <version>_<name>.sql, with a version of 1 to 18 digits that no other file has, "
    "and is UTF-8 text"
)
LOOK = (
    "give it with --migrations DIR or metadata_db.migrations.dir; "
    "a relative path in the configuration file is relative to that file"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for migrations."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    return folder


def fill(folder: Path, files: dict[str, bytes | str]) -> None:
    """Write the files of a folder; a name that ends with a slash is a folder."""
    for name, content in files.items():
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def refusal(folder: Path | str) -> InvalidMigration:
    """Return the error that reading ends in."""
    with pytest.raises(InvalidMigration) as error:
        read_migrations(folder)
    assert error.value.code == "invalid_migration"
    return error.value


def test_a_folder_is_read_in_the_order_of_versions(folder: Path) -> None:
    """Versions are ordered as numbers; each migration has its text, its checksum and its path."""
    fill(folder, {"10_c.sql": "SELECT 10;", "9_b.up.sql": "SELECT 9;\r\n", "000000000000000011_d.sql": ""})
    fill(folder, {"002_a.sql": "\ufeffSELECT 'ä';\n"})
    assert read_migrations(folder) == (
        Migration(2, "a", f"{folder}/002_a.sql", "SELECT 'ä';\n", checksum("SELECT 'ä';\n".encode())),
        Migration(9, "b", f"{folder}/9_b.up.sql", "SELECT 9;\r\n", checksum(b"SELECT 9;\n")),
        Migration(10, "c", f"{folder}/10_c.sql", "SELECT 10;", checksum(b"SELECT 10;")),
        Migration(11, "d", f"{folder}/000000000000000011_d.sql", "", checksum(b"")),
    )
    assert read_migrations(str(folder)) == read_migrations(folder)


def test_a_folder_is_read_in_slices(folder: Path) -> None:
    """The event loop can go on after each entry of the list, and after each file."""
    fill(folder, {f"{number}_a.sql": "SELECT 1" for number in range(1, 6)})
    assert sum(1 for _ in reading(folder)) >= 2 * len(list(folder.iterdir()))


@pytest.mark.parametrize("size", [4, 5, 7, 1000])
def test_what_is_cut_between_two_pieces_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Neither a character nor a CRLF is lost where a file is read in pieces, and lines are counted through them."""
    monkeypatch.setattr("ampd.source._PIECE", size)
    texts = ("", "\r", "a\r", "\r\n", "\r\r\n\r", "größe 中\r\n\U0001f418\r\n\r", "a\r\n" * size)
    fill(folder, {f"{number}_a.sql": "x" * (size % 3) + text for number, text in enumerate(texts)})
    fill(folder, {f"1{number}_a.sql": "\ufeff" + text for number, text in enumerate(texts)})
    for file in read_migrations(folder):
        content = Path(file.file).read_bytes()
        assert (file.sql, file.checksum) == (content.decode().removeprefix("\ufeff"), checksum(content))
    fill(folder, {"1_a.sql": "\n\r\nä\0\0", "2_a.sql": b"\r\n\nxxx\xc3", "3_a.sql": b"\n\n\nxxx\xff\n\0"})
    assert refusal(folder).message == (
        f"3 faults in the files of {folder}:\n"
        "  1_a.sql holds a NUL byte in line 3\n"
        "  2_a.sql is not UTF-8 text (line 3)\n"
        "  3_a.sql is not UTF-8 text (line 4)"
    )


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "it is empty"),
        ({"1_a.down.sql": "", "2_b.down.sql": ""}, "passed over: 1_a.down.sql, 2_b.down.sql"),
        ({"2024-01-01-1_a/": "", "2024-01-02-2_b/": ""}, "passed over: 2024-01-01-1_a/, 2024-01-02-2_b/"),
        ({"._1_a.sql": "", ".sql": "", "..data/": ""}, "passed over: ..data/, ._1_a.sql, .sql"),
        ({f"{number}.txt": "" for number in range(9)}, "passed over: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more"),
    ],
    ids=["empty", "ways back", "subfolders", "dot files", "many"],
)
def test_a_folder_without_migrations(folder: Path, files: dict[str, bytes | str], why: str) -> None:
    """A folder in which nothing is left, unmounted for example, is an error that names what was passed over."""
    fill(folder, files)
    error = refusal(folder)
    hint = f"{LOOK}; subfolders are not read" if any(name.endswith("/") for name in files) else LOOK
    assert str(error) == f"the migrations folder {folder} contains no file <version>_<name>.sql ({why})\nhint: {hint}"
    assert error.file == str(folder)


def test_what_is_not_a_migration_is_ignored(folder: Path) -> None:
    """Files that are not .sql, the ways back of other tools, dot files, and subfolders of any name are left alone."""
    fill(folder, {"1_a.sql": "SELECT 1;", "1_a.down.sql": "\0", "x.down.sql": "", "README.md": "", "seed.sql.bak": ""})
    fill(folder, {"._1_a.sql": b"\xff", ".2_b.sql": "", "2_b.DOWN.SQL": "", "2_b.Down.sql": ""})
    fill(folder, {"3_c.txt": "", "sql": "", "sub/": "", "4_d.sql/": "", "y.sql/": ""})
    fill(folder / "sub", {"5_e.sql": "", "bad.sql": ""})
    assert [migration.file for migration in read_migrations(folder)] == [f"{folder}/1_a.sql"]


def test_what_is_not_a_regular_file_is_refused(folder: Path) -> None:
    """A named pipe, a socket or a device is not waited for, be it there itself or behind a link."""
    os.mkfifo(folder / "1_a.sql")
    (folder / "2_b.sql").symlink_to(folder / "1_a.sql")
    (folder / "3_c.sql").symlink_to("/dev/zero")
    assert str(refusal(folder)) == (
        f"3 faults in the files of {folder}:\n"
        "  1_a.sql is not a regular file\n"
        "  2_b.sql is not a regular file\n"
        "  3_c.sql is not a regular file\n"
        f"hint: {NAMING}"
    )


def test_a_link_within_the_folder_is_the_file_it_points_to(folder: Path, tmp_path: Path) -> None:
    """Links as Kubernetes mounts a ConfigMap are followed, also where the folder is one; one to a folder is passed."""
    (folder / "..2026_01").mkdir()
    (folder / "..2026_01" / "1_a.sql").write_text("SELECT 1;")
    (folder / "..data").symlink_to("..2026_01")
    (folder / "1_a.sql").symlink_to("..data/1_a.sql")
    (folder / "2_b.sql").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert [(each.version, each.sql) for each in read_migrations(path)] == [(1, "SELECT 1;")]


def test_a_link_that_leads_out_is_refused(folder: Path, tmp_path: Path) -> None:
    """A failing line is shown, and whoever made the link may not be able to read the file."""
    (tmp_path / "shadow").write_text("root:secret")
    (folder / "1_a.sql").symlink_to(tmp_path / "shadow")
    assert str(refusal(folder)) == f"{folder}/1_a.sql is a link that leads out of the folder\nhint: {NAMING}"


def test_a_file_beyond_measure_is_refused(folder: Path) -> None:
    """It is told by its size, without having been read to its end."""
    with (folder / "1_a.sql").open("wb") as file:
        file.truncate(512 * 2**20 + 1)
    assert str(refusal(folder)) == f"{folder}/1_a.sql is larger than 512 MiB\nhint: {NAMING}"


def test_a_name_that_cannot_be_printed_is_refused(folder: Path) -> None:
    """A line break in a name would end the comment that a dry run names the file in."""
    fill(folder, {"1_a\nDROP TABLE t; --.sql": "", "2_\x1b[31m.sql": "", "3_a\u202eb.sql": "", "4_größe 中.sql": ""})
    assert str(refusal(folder)) == (
        f"3 faults in the files of {folder}:\n"
        "  1_a\\nDROP TABLE t; --.sql has a character in its name that cannot be printed\n"
        "  2_\\x1b[31m.sql has a character in its name that cannot be printed\n"
        "  3_a\\u202eb.sql has a character in its name that cannot be printed\n"
        f"hint: {NAMING}"
    )


@pytest.mark.parametrize(
    ("files", "first", "message"),
    [
        ({"a.sql": ""}, "a.sql", "{folder}/a.sql is not named <version>_<name>.sql"),
        ({"1_a.SQL": ""}, "1_a.SQL", "{folder}/1_a.SQL does not end in .sql, in small letters"),
        ({"1_a.sql": "", "2_b.Sql": ""}, "2_b.Sql", "{folder}/2_b.Sql does not end in .sql, in small letters"),
        (
            {"1234567890123456789_a.sql": ""},
            "1234567890123456789_a.sql",
            "{folder}/1234567890123456789_a.sql has a version of 19 digits",
        ),
        (
            {"1234567890123456789.sql": ""},
            "1234567890123456789.sql",
            "{folder}/1234567890123456789.sql is not named <version>_<name>.sql",
        ),
        ({"01_a.sql": "", "1_b.sql": ""}, "1_b.sql", "{folder}/1_b.sql has version 1, and so has 01_a.sql"),
        ({"1_a.sql": "", "1_a.up.sql": ""}, "1_a.up.sql", "{folder}/1_a.up.sql has version 1, and so has 1_a.sql"),
        ({"1_a.sql": "SELECT 1;\n\n'\0'"}, "1_a.sql", "{folder}/1_a.sql holds a NUL byte in line 3"),
        ({"1_a.sql": b"\0"}, "1_a.sql", "{folder}/1_a.sql holds a NUL byte in line 1"),
        ({"1_a.sql": b"SELECT 1;\n-- caf\xe9\n"}, "1_a.sql", "{folder}/1_a.sql is not UTF-8 text (line 2)"),
        ({"1_a.sql": b"\xef\xbb\xbf\n\n\xff"}, "1_a.sql", "{folder}/1_a.sql is not UTF-8 text (line 3)"),
        ({"1_a.sql": "SELECT 1;\n".encode("utf-16")}, "1_a.sql", "{folder}/1_a.sql is not UTF-8 text (line 1)"),
        ({"1_a.sql": b"-- \xed\xa0\x80"}, "1_a.sql", "{folder}/1_a.sql is not UTF-8 text (line 1)"),
    ],
)
def test_one_offender(folder: Path, files: dict[str, bytes | str], first: str, message: str) -> None:
    """A file that cannot be used is an error with its name, what is wrong with it and in which line."""
    fill(folder, files)
    error = refusal(folder)
    assert str(error) == f"{message.format(folder=folder)}\nhint: {NAMING}"
    assert error.file == f"{folder}/{first}"


def test_every_offender_is_named_at_once(folder: Path) -> None:
    """All that is wrong with a folder is one error: each file, each fault, in the order of names."""
    fill(folder, {"01_a.sql": b"\xff", "1_b.sql": b"\0", "001_c.sql": "", "2_fine.sql": "SELECT 1;", "seed.sql": ""})
    fill(folder, {"3_x.sql": "a\n\0", "V4__y.sql": b"\xff"})
    (folder / "5_loop.sql").symlink_to("5_loop.sql")
    (folder / "6_gone.sql").symlink_to("nothing")
    error = refusal(folder)
    assert error.message == (
        f"9 faults in the files of {folder}:\n"
        "  01_a.sql has version 1, and so has 001_c.sql\n"
        "  01_a.sql is not UTF-8 text (line 1)\n"
        "  1_b.sql has version 1, and so has 001_c.sql\n"
        "  1_b.sql holds a NUL byte in line 1\n"
        "  3_x.sql holds a NUL byte in line 2\n"
        "  5_loop.sql cannot be read: Too many levels of symbolic links\n"
        "  6_gone.sql cannot be read: No such file or directory\n"
        "  V4__y.sql is not named <version>_<name>.sql\n"
        "  seed.sql is not named <version>_<name>.sql"
    )
    assert error.file == f"{folder}/01_a.sql"


def test_a_name_that_is_not_utf8(folder: Path) -> None:
    """A name that the history could not hold is an offender, shown in characters that everything can print."""
    try:
        (Path(os.fsdecode(os.fsencode(folder) + b"/1_\xff.sql"))).write_text("SELECT 1;")
    except OSError:
        pytest.skip("this file system takes no such name")
    error = refusal(folder)
    assert error.message == f"{folder}/1_\\xff.sql has a name that is not UTF-8"
    assert error.file == f"{folder}/1_\\xff.sql"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A missing folder, and a file in its place, are errors that say how to name the right one."""
    assert str(refusal(tmp_path / "none")) == f"the migrations folder {tmp_path}/none does not exist\nhint: {LOOK}"
    (tmp_path / "file").write_text("")
    error = refusal(tmp_path / "file")
    assert str(error) == f"the migrations folder {tmp_path}/file is not a folder\nhint: {LOOK}"
    assert error.file == f"{tmp_path}/file"
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "loop").message == (
        f"the migrations folder {tmp_path}/loop cannot be read: Too many levels of symbolic links"
    )


def test_an_empty_path_is_no_folder() -> None:
    """Nothing is not taken for the working folder, which a dot stands for."""
    assert str(refusal("")) == "the migrations folder is an empty path\nhint: write . for the working folder"


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up the superuser's rights, where we have them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        (lambda folder: folder.parent.chmod(0), "the migrations folder {folder} cannot be read: Permission denied"),
        (lambda folder: folder.chmod(0), "the migrations folder {folder} cannot be read: Permission denied"),
        (lambda folder: folder.chmod(0o444), "{folder}/1_a.sql cannot be read: Permission denied"),
        (lambda folder: (folder / "1_a.sql").chmod(0), "{folder}/1_a.sql cannot be read: Permission denied"),
    ],
    ids=["parent", "folder", "listed only", "file"],
)
def test_what_may_not_be_read(lock: Callable[[Path], None], message: str) -> None:
    """A folder or a file without the permission to read it is an error, and no traceback."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name) / "inner" / "migrations"
        folder.mkdir(parents=True)
        fill(folder, {"1_a.sql": "SELECT 1;"})
        Path(name).chmod(0o755)
        lock(folder)
        try:
            with as_nobody():
                error = refusal(folder)
        finally:
            folder.parent.chmod(0o755)
            folder.chmod(0o755)
        assert error.message == message.format(folder=folder)


def test_the_packaged_migrations() -> None:
    """Without a folder the packaged files are read, by the same rules, and named as in the repository."""
    folder = Path(ampd.__file__).with_name("migrations")
    packaged = read_migrations()
    assert len(packaged) >= 5
    assert [migration.file for migration in packaged] == [
        f"ampd/migrations/{file.name}" for file in sorted(folder.glob("*.sql"))
    ]
    assert [(each.version, each.checksum) for each in packaged] == [
        (each.version, each.checksum) for each in read_migrations(folder)
    ]


def test_packaged_migrations_in_an_archive(tmp_path: Path) -> None:
    """From a zipped package, where there is no folder on disk, the same migrations are read."""
    package = Path(ampd.__file__).parent
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", package.parent, package.name)
    program = "import ampd; print(ampd.__file__); print(*(each.checksum.hex() for each in ampd.read_migrations()))"
    environment = os.environ | {"PYTHONPATH": archive, "PYTHONSAFEPATH": "1"}
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, checksums = told.stdout.splitlines()
    assert where.startswith(archive)
    assert checksums.split() == [migration.checksum.hex() for migration in read_migrations()]


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "an archive"])
def test_an_installation_without_its_migrations(tmp_path: Path, left: str) -> None:
    """A wheel that has lost its .sql files is not up to date: it is told to be installed again."""
    package = shutil.copytree(Path(ampd.__file__).parent, tmp_path / "site" / "ampd")
    shutil.rmtree(package / "migrations")
    if left == "an empty folder":
        (package / "migrations").mkdir()
    where = package.parent
    if left == "an archive":
        where = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", where, "ampd"))
    program = "import ampd\ntry: ampd.read_migrations()\nexcept ampd.InvalidMigration as error: print(error)"
    environment = os.environ | {"PYTHONPATH": str(where), "PYTHONSAFEPATH": "1"}
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    what = "contains no file <version>_<name>.sql (it is empty)" if left == "an empty folder" else "does not exist"
    assert told.stdout == (
        f"the migrations folder ampd/migrations {what}\n"
        "hint: install ampd again, with its .sql files, or give a folder of your own with --migrations DIR\n"
    )
