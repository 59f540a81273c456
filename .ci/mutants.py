"""Mutation testing of what decides which blocks are kept: mutmut on a copy of the tree, all mutants or a fixed sample.

    python .ci/mutants.py WORKDIR [SAMPLE]

mutmut passes over properties and functions under lru_cache; in the copy both are unwrapped, so that they count too.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTATED = ("blocks.py", "selection.py", "policies/*.py")
TESTS = ("tests/policies", "tests/test_blocks.py", "tests/test_selection.py")
# Starts processes of its own, which would import the unmutated package.
SEED = 0
LEAST = 0.9
# Exit codes of mutmut's workers; one that runs out of time was caught by that.
KILLED, TIMED_OUT, SURVIVED = (1, 3), (-24, 24, 36, 152, 255), 0

SETTINGS = f"""
[tool.mutmut]
source_paths = ["src"]
only_mutate = {[f"src/stem_attention/{path}" for path in MUTATED]}
pytest_add_cli_args = ["-x", "-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {list(TESTS)}
use_git_change_detection = false
"""


def unwrapped(text: str) -> str:
    """The same module without ``lru_cache``, and with every property built from a plain method."""
    lines = text.splitlines()
    for node in sorted(ast.walk(ast.parse(text)), key=lambda node: getattr(node, "lineno", 0), reverse=True):
        if not isinstance(node, ast.FunctionDef) or len(node.decorator_list) != 1:
            continue
        decorator = node.decorator_list[0]
        line, name = decorator.lineno - 1, ast.unparse(decorator)
        if name == "property" and node.end_lineno is not None:
            indent = " " * node.col_offset
            lines.insert(node.end_lineno, f"{indent}{node.name} = property(_get_{node.name})")
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"def {node.name}(", f"def _get_{node.name}(", 1)
        elif not name.startswith("lru_cache"):
            continue
        del lines[line]
    return "\n".join(lines) + "\n"


def prepare(work: Path) -> None:
    """Lay a copy of the tree out in ``work`` and unwrap what is to be mutated."""
    work.mkdir(parents=True)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + SETTINGS)
    for pattern in MUTATED:
        for path in (work / "src" / "stem_attention").glob(pattern):
            path.write_text(unwrapped(path.read_text()))


def outcomes(work: Path) -> dict[str, int | None]:
    """Exit code of the tests under every mutant; None where they were not run."""
    found: dict[str, int | None] = {}
    for path in sorted((work / "mutants").rglob("*.meta")):
        found.update(json.loads(path.read_text())["exit_code_by_key"])
    return found


def run(work: Path, names: list[str]) -> None:
    """Run mutmut on some mutants. Told of a name that none has, it makes them all and stops."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    with (work / "mutmut.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)


def main(work: Path, sample: int | None) -> int:
    """Mutate, test, and print every mutant that was not killed and the share of those that were."""
    if not work.exists():
        prepare(work)
        run(work, ["none.at.all"])
    names = sorted(outcomes(work))
    chosen = names if sample is None else sorted(random.Random(SEED).sample(names, sample))
    run(work, chosen)
    codes = outcomes(work)
    left = [name for name in chosen if codes[name] not in KILLED + TIMED_OUT]
    for name in left:
        print(name, "survived" if codes[name] == SURVIVED else f"was not tested ({codes[name]})")
    share = 1 - len(left) / len(chosen)
    print(f"{len(chosen)} of {len(names)} mutants (seed {SEED}): {share:.1%} killed")
    return 0 if share >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
