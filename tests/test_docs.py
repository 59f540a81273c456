"""Every Python block in README, CONTRIBUTING and docs/ runs, page by page, links lead somewhere, and every example runs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stem_attention import Mass, Stem
from stem_attention.blocks import block_count
from stem_attention.policies import Ranked, policy_names, read_policy

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ROOT / "docs" / "policies.md"
SCHEDULE = set(Stem().to_dict()) - {"policy", "stride", "beta", "magnitude"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LOCAL_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)[^)]*\)")


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON_BLOCK.search(page.read_text())], ids=name)
def test_python_blocks_run_in_order(page):
    text = page.read_text()
    scope = {"__name__": "__docs__"}
    torch.manual_seed(0)
    for block in PYTHON_BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        # Empty lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * line + block[1], str(page), "exec", dont_inherit=True), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_fence_is_closed_and_named_and_every_link_leads_somewhere(page):
    assert [link for link in LOCAL_LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert all(fences[0::2]), "an opening fence names its language"
    assert len(fences) % 2 == 0
    assert not any(fences[1::2])


def table(page, first_heading):
    """Rows of the page's table whose first column has this heading, as stripped cells."""
    lines = page.read_text().split(f"| {first_heading} |", 1)[1].splitlines()[2:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("policy", [Mass(), Stem()], ids=lambda policy: policy.name)
def test_policies_lists_every_field_with_its_default(policy):
    rows = table(POLICIES, f"field of `{type(policy).__name__}`")
    written = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows}
    assert {"policy": policy.name, **written} == policy.to_dict()


def test_policies_lists_every_other_policy_with_its_fields():
    rows = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in table(POLICIES, "name")}
    named = {text: read_policy(text) for text in policy_names()}
    assert set(rows) == {text for text, policy in named.items() if not isinstance(policy, (Mass, Stem))}
    for text, (cls, fields) in rows.items():
        settings, policy = re.findall(r"\w+=[\w.]+", fields), named[text]
        schedule = SCHEDULE if isinstance(policy, Ranked) else set()
        assert type(policy).__name__ == cls
        assert {setting.partition("=")[0] for setting in settings} | schedule == set(policy.to_dict()) - {"policy"}
        assert read_policy(f"{text}:{','.join(settings)}") == policy


def test_policies_tells_what_every_preset_of_stem_keeps():
    for prompt, *shares in table(POLICIES, "prompt"):
        for share, policy in zip(shares, (Stem(), Stem.paper(), Stem.angelslim()), strict=True):
            limits = policy.row_limits(block_count(int(prompt), policy.block_size))
            assert share == f"{sum(limits) / sum(range(1, len(limits) + 1)):.3f}", (prompt, policy)


def test_the_example_of_a_policy_is_the_one_on_the_page():
    def code(text):
        body = text.partition("class Nearest(Policy):")[2].partition("    name: ClassVar")[2]
        return body.partition("num_blocks))\n")[0].splitlines()

    assert code(POLICIES.read_text()) == code((ROOT / "examples" / "custom_policy.py").read_text()) != []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tiny_llama, tmp_path):
    """On a model of toy size where it asks for one, which has no chat format, and whose answers nobody reads."""
    ran = subprocess.run(
        [sys.executable, example, *(["--model", tiny_llama] if example.stem == "finetune_long" else [])],
        cwd=tmp_path,
        env={**os.environ, "MODEL": str(tiny_llama), "TOKENS": "600"},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip(), "an example shows what it did"
    assert "Warning" not in ran.stderr
    assert all(file.suffix == ".png" and file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


def test_every_example_is_listed_in_the_docs():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [example.name for example in EXAMPLES if f"examples/{example.name}" not in index] == []
