from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVELOPING = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"`((?:darefine_qupath|scripts|tests|projects|docs)/[\w./-]+)", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_that_a_page_links_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_nine_places_hold_what_the_table_says() -> None:
    rows = re.findall(r"^\| .*? \| (.*) \|$", DEVELOPING.split("## How to add an encoder")[0], re.MULTILINE)[2:]
    assert len(rows) == 9
    for file, names in re.findall(r"`(darefine_qupath/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", "\n".join(rows)):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        known = {getattr(node, "name", None) for node in ast.walk(tree)}
        known |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert set(re.findall(r"\w+", names)) <= known, file
