"""Each promise of docs/reliability.md names tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_every_test_that_the_page_names_exists():
    files = {path.relative_to(TESTS.parent).as_posix(): path for path in TESTS.rglob("*.py")}
    known = {*files, *(path.name for path in files.values())}
    functions = set(re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in files.values())))
    named = re.findall(r"`((?:tests/)?[\w/]*\btest_\w+(?:\.py)?)`", PAGE)
    assert [name for name in named if name not in known | functions] == []


def test_every_promise_names_a_test():
    tables = re.findall(r"^\| promise \| held by \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert len(tables) == 2
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) >= 20
    assert [row for row in rows if not re.search(r"`[\w/]*test_\w+\.py`", row.split(" | ")[-1])] == []
