"""Every sentence of README and the pages keeps to what CONTRIBUTING.md says of language: words, length, numbers in tables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [*(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))]
LONGEST, MOST_NUMBERS = 32, 2

FENCE = re.compile(r"^(```|~~~).*?^\1$", re.DOTALL | re.MULTILINE)
NO_PROSE = re.compile(
    r"^(\||#|<|:::|!\[|    )|^\s*$"
)  # tables, headings, HTML, what mkdocstrings fills in, pictures, blank lines
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
UNITS = r"%|\u00d7|ms|s|x|points?|nats?|times|GB|GiB|MB|MiB|KiB|TB/s|TFLOP/s|MHz|W|prompts|windows"
# A measured number: with a fraction, a sign or a unit. Sizes that only say what was run (blocks of 64, 8K) are none.
NUMBER = re.compile(rf"(?<![\w.])(?:[\u2212\u00b1+]\d[\d.,]*|\d+\.\d+|\d[\d,]*(?= ?(?:{UNITS})(?![\w-])))(?![\w.]*\d)")
NAMES = "Python|torch|PyTorch|Triton|transformers|vLLM|SGLang|CUDA|arXiv|mutmut"
VERSION = re.compile(rf"(?:{NAMES})(?: (?:or|to|and)? ?\d[\d.]*)+|[A-Za-z]+-?\d[\w.]*(?:-\w+)?")


def sentences(text):
    """Each sentence with its line; a list's item and a paragraph end one, code and links are left as the word ``X``."""
    text = FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    found, held, first = [], "", 1
    for line, content in enumerate([*text.splitlines(), ""], 1):
        if NO_PROSE.match(content) or ITEM.match(content):
            if held:
                found.append((first, held))
            held = ""
        if not NO_PROSE.match(content):
            if not held:
                first = line
            held += " " + ITEM.sub("", content).strip()
    for first, paragraph in found:
        plain = re.sub(r"`[^`]*`", "X", paragraph)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        plain = re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", plain)
        for sentence in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`X(])|(?<=[.!?])\s+", plain):
            yield first, sentence.strip()


def numbers(sentence):
    return NUMBER.findall(VERSION.sub("", sentence))


def banned():
    """The left column of the table in CONTRIBUTING.md whose heading is "not": what no page says."""
    rows = CONTRIBUTING.read_text().split("| not | but |", 1)[1].splitlines()[2:]
    cells = [row.strip("|").split("|")[0].strip() for row in rows[: rows.index("")]]
    return [re.compile(rf"(?<!\w){re.escape(cell)}(?!\w)", re.IGNORECASE) for cell in cells]


def complaints(text):
    """What is wrong with a page, a line each."""
    for line, sentence in sentences(text):
        if len(sentence.split()) > LONGEST:
            yield f"{line}: {len(sentence.split())} words, at most {LONGEST}; make it two sentences: {sentence}"
        if len(numbers(sentence)) > MOST_NUMBERS:
            yield f"{line}: {', '.join(numbers(sentence))} in one sentence; make it a table: {sentence}"
        for words in banned():
            if words.search(sentence):
                yield f"{line}: {words.search(sentence)[0]!r}; see the table of words in CONTRIBUTING.md: {sentence}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_plain(page):
    assert list(complaints(page.read_text())) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("It loses 0.37 at 8K and 0.18 at 32K, but the paper's settings lose 0.32.", "make it a table"),
        ("Dense took 3 ms, `Stem` 2 ms\nand `Mass` 1 ms.", "make it a table"),
        ("The word " + "again and " * 20 + "again.", "make it two sentences"),
        ("This page said 4 before: which this page said.", "table of words"),
        ("- An item is plain.\n- Another is not: it goes beyond expectations and leverages nothing.", "table of words"),
    ],
)
def test_what_is_not_plain_is_found(text, wrong):
    assert [wrong in complaint for complaint in complaints(text)] == [True]


@pytest.mark.parametrize(
    "text",
    [
        "| a table | 0.37 | 0.18 | 0.32 | 0.17 |",
        "```text\n0.37 0.18 0.32 0.17\n```",
        "Blocks of 64 and 128 with head_dim 64, 128 and 256 run on an H100 with torch 2.11.0, Triton 3.6.0 and Python 3.12.",
        "`0.37`, `0.18`, `0.32` and `0.17` are code.",
        "One takes 1.5 ms.\n\nAnother 2.5 ms.\n\n* A third 3.5 ms.",
    ],
)
def test_what_is_plain_is_left_alone(text):
    assert list(complaints(text)) == []
