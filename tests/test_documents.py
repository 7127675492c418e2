"""What the documents name is there."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

import ampd

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
RAW = REPOSITORY.replace("github.com", "raw.githubusercontent.com")  # which a picture is shown from
OURS = f"(?:{re.escape(REPOSITORY)}/blob|{re.escape(RAW)})/main/"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")]
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_link_leads_to_a_file(document: Path) -> None:
    """Every relative link of a document leads to something in the repository."""
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []
    assert [link for link in re.findall(rf"\]\({OURS}([^)#]+)", text) if not (ROOT / link).exists()] == []


def headings(document: Path) -> set[str]:
    """Return what an anchor can be in a document, as GitHub and the site both spell it."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_an_anchor_is_a_heading(document: Path) -> None:
    """Every anchor of a link into the repository is a heading of the document that it leads to."""
    links = re.findall(rf"\]\((?:({OURS})|(?!https?://))([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8"))
    folder = {True: ROOT, False: document.parent}
    targets = [(folder[bool(ours)] / path if path else document, anchor) for ours, path, anchor in links]
    assert [(path.name, anchor) for path, anchor in targets if anchor not in headings(path)] == []


def test_the_readme_has_no_relative_link() -> None:
    """The package index shows it apart from the repository."""
    assert re.findall(r"\]\((?!https://|#)([^)]+)\)", README) == []


def test_the_picture_of_the_modules_is_complete() -> None:
    """ARCHITECTURE.md lists every module and every package, and nothing else."""
    picture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    listed, package = [], ""
    for indent, name in re.findall(r"^  (  )?(\w+/?) ", picture, re.MULTILINE):
        package = package if indent else name if name.endswith("/") else ""
        listed.append(package + name if indent else name)
    ours = ROOT / "ampd"
    packages = [path for path in ours.iterdir() if path.is_dir() and path.name != "__pycache__"]
    modules = [*ours.glob("*.py"), *(path for path in ours.glob("*/*.py") if path.stem != "__init__")]
    there = [f"{path.name}/" for path in packages] + [str(path.relative_to(ours).with_suffix("")) for path in modules]
    assert sorted(listed) == sorted(there)


def test_the_layers_are_those_of_the_contract() -> None:
    """ARCHITECTURE.md shows the layers that the linter enforces."""
    contract = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = re.search(r"    (__main__ > [^`]+?)\n\n", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert shown is not None
    assert " ".join(shown[1].split()).split(" > ") == [layer.replace(" |", ",") for layer in contract]


def page(name: str) -> str:
    """Return the text of a page of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_page_of_errors_lists_every_one() -> None:
    """The table of errors has each class with its code, and no other."""
    rows = re.findall(r"^\| `(\w+)` \| (`\w+`.*?) \|", page("errors.md"), re.MULTILINE)
    listed = {(name, code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    public = {name: getattr(ampd, name) for name in ampd.__all__}
    errors = {
        (name, value.code)
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, ampd.AmpdError) and value is not ampd.AmpdError
    }
    assert listed == errors


def test_the_page_of_events_lists_every_one() -> None:
    """The table of events has each class, and no other."""
    table = page("events.md").split("| event | tells |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    public = {name: getattr(ampd, name) for name in ampd.__all__}
    kinds = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, ampd.Event)}
    assert listed == kinds - {"Event"}


def test_the_page_shows_every_key_of_the_configuration(tmp_path: Path) -> None:
    """The configuration of the page is one that can be loaded, and has every key."""
    text = re.findall(r"```toml\n(\[metadata_db\].*?)```", page("configuration.md"), re.DOTALL)[0].replace(
        "postgresql://…", "postgresql:///d"
    )
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    (tmp_path / "config.toml").chmod(0o600)
    ampd.load_config(tmp_path / "config.toml")
    shown = tomllib.loads(text.replace("# url_file", "url_file"))["metadata_db"]
    assert set(shown) == {field.name for field in msgspec.structs.fields(ampd.MetadataDb)}
    assert set(shown["migrations"]) == {field.name for field in msgspec.structs.fields(ampd.Migrations)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_public_name_in_a_document_is_one(document: Path) -> None:
    """Whatever a document calls ampd.Something is a public name."""
    names = re.findall(r"\bampd\.([A-Za-z]\w*)\b(?!\.py)", document.read_text(encoding="utf-8"))
    known = {*ampd.__all__, "internal", "found", "errors", "local_server", "cli"}  # a host, a setting, modules
    known |= {"run", "migration", "error"}  # attributes of spans
    assert [name for name in names if name not in known] == []


def test_the_makefile_explains_its_targets() -> None:
    """`make help` has a line for each target, and whatever a document asks to `make` is one."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert explained == set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    texts = [*DOCUMENTS, ROOT / ".ci" / "run", *ROOT.glob(".github/workflows/*"), ROOT / ".pre-commit-config.yaml"]
    asked = {
        target
        for text in texts
        for words in re.findall(r"(?:`|entry: |run: |^ {4}|^)make ((?:[a-z0-9-]+ ?)+)", text.read_text(), re.MULTILINE)
        for target in words.split()
    }
    assert {target for target in asked if not re.fullmatch("test-1[3-8]", target)} <= explained
