"""What the documents name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_link_leads_to_a_file(document: Path) -> None:
    """Every relative link of a document leads to something in the repository."""
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_picture_of_the_modules_is_complete() -> None:
    """ARCHITECTURE.md lists every module and every package, and nothing else."""
    picture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    names = set(re.findall(r"^  (?:  )?(\w+/?) ", picture, re.MULTILINE))
    files = [path for path in (ROOT / "ampd").rglob("*.py") if path.parent.name == "ampd" or path.stem != "__init__"]
    packages = {f"{path.name}/" for path in (ROOT / "ampd").iterdir() if any(path.glob("*.*")) and path.is_dir()}
    assert names == {path.stem for path in files} | {each for each in packages if each != "__pycache__/"}


def test_the_layers_are_those_of_the_contract() -> None:
    """ARCHITECTURE.md shows the layers that the linter enforces."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = re.search(r"    (__main__ > [^`]+?)\n\n", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert shown is not None
    assert " ".join(shown[1].split()).split(" > ") == [layer.replace(" |", ",") for layer in contract]
