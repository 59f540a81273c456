"""Every Python block in README, CONTRIBUTING and docs/ runs, page by page, and links between pages lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.policies.budget import block_count, row_budgets

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LOCAL_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)[^)]*\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON_BLOCK.search(page.read_text())], ids=name)
def test_python_blocks_run_in_order(page: Path) -> None:
    text = page.read_text()
    scope: dict[str, object] = {"__name__": "__docs__"}
    torch.manual_seed(0)
    for block in PYTHON_BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        # Empty lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * line + block[1], str(page), "exec", dont_inherit=True), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_fence_is_closed_and_named(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert all(fences[0::2]), "an opening fence names its language"
    assert len(fences) % 2 == 0
    assert not any(fences[1::2])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    assert [link for link in LOCAL_LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


def table(page: Path, first_heading: str) -> list[list[str]]:
    """Rows of the page's table whose first column has this heading, as stripped cells."""
    lines = page.read_text().split(f"| {first_heading} |", 1)[1].splitlines()[2:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_configuration_lists_every_field_with_its_default() -> None:
    rows = table(ROOT / "docs" / "configuration.md", "field")
    assert {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows} == StemConfig().to_dict()


def test_configuration_tells_the_density_of_every_preset() -> None:
    for prompt, *shares in table(ROOT / "docs" / "configuration.md", "prompt"):
        for share, config in zip(shares, (StemConfig(), StemConfig.paper(), StemConfig.angelslim()), strict=True):
            blocks = block_count(int(prompt), config.block_size)
            kept = sum(row_budgets(config, blocks)) / (blocks * (blocks + 1) / 2)
            assert share == f"{kept:.3f}", (prompt, config)
