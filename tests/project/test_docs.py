"""Pages that people read: lines that fit, links that lead somewhere, a short README."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.kit.launches import ROOT

#: Columns of a line of prose.
WIDTH = 100


def pages() -> list[Path]:
    tracked = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # Records are written by commands.
    return [ROOT / name for name in tracked if not name.startswith("docs/records/")]


def prose(page: Path) -> list[str]:
    """Lines that can be wrapped: no code, no tables, nothing that one link or code span fills."""
    lines, code = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("```"):
            code = not code
        elif not code and not line.startswith(("|", "#", "    ", "![")):
            lines.append(line)
    return lines


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit_and_links_lead_somewhere(page: Path) -> None:
    assert not [line for line in prose(page) if len(line) > WIDTH and " " in line[:WIDTH].strip()]
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^[^`|]*\S (?:#{2,} \w|```).*", text, re.M), "a heading amid a paragraph"
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target.strip()).exists(), target


def test_the_readme_is_short_and_its_index_is_whole() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_pages_name_files_that_exist() -> None:
    """A path in code style of a folder of ours is there."""
    rooms = "data|engine|launcher|experiments|tests|benchmarks|ds_configs|recipes|slurm|docs"
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(rf"`((?:{rooms})/[\w./-]+?\.(?:py|sh|toml|json|md))`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
