"""What is installed: the typed marker, the licence, the command; and `import stem_attention` needs torch alone."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tests.toys import without

import stem_attention
from stem_attention.models.load import EMBEDDED_PACKAGE, EMBEDDED_VERSION

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("triton", "transformers", "vllm", "rich", "typer", "matplotlib", "numpy", "gguf", "lm_eval")

WITH_TORCH_ALONE = f"""{without(OPTIONAL)}
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
import stem_attention

q, k, v = (torch.randn(1, 300, heads, 16) for heads in (4, 2, 2))
for policy in (None, "mass:key_pool=16,block_size=16", "paper:block_size=16"):
    out = stem_attention.stem_attention(q, k, v, policy=policy, dense_below=0)
    assert out.shape == q.shape and bool(out.isfinite().all())
assert not set({OPTIONAL!r}) & {{name.partition(".")[0] for name in sys.modules}}
print("works with torch alone")
"""

LIGHT = """
import sys, torch
before = set(sys.modules)
import stem_attention
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_and_call_work_with_torch_alone():
    assert python(WITH_TORCH_ALONE) == "works with torch alone"


def test_import_loads_no_package_that_torch_has_not_loaded():
    assert python(LIGHT) == "stem_attention"


def test_torch_and_what_it_brings_are_the_only_hard_dependencies_besides_the_commands():
    required = [line for line in importlib.metadata.requires("stem-attention") or [] if "extra ==" not in line]
    assert sorted(required) == ["rich>=13", "torch>=2.8", "typer>=0.19", "typing-extensions>=4.10"]


def test_the_command_is_installed():
    path = Path(sys.executable).with_name("stem-attention")
    shown = subprocess.run([path, "--help"], check=True, capture_output=True, text=True).stdout
    assert all(name in shown for name in ("run", "inspect", "calibrate", "compile", "doctor"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source archive, built with the tools that are installed."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


def test_readme_example_runs_from_the_wheel_outside_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    example = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert example is not None
    told = "\nimport stem_attention; print(stem_attention.__file__, stem_attention.__version__)\n"
    run = subprocess.run(
        [sys.executable, "-c", example[1] + told], check=True, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    file, version = run.stdout.split()[-2:]
    assert importlib.metadata.version("stem-attention") == stem_attention.__version__
    assert Path(file).is_relative_to(installed)
    assert f"-{version}-" in wheel.name


def test_version_follows_the_tag_and_sources_without_git_can_be_built(tmp_path):
    def run(*command):
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    version = sys.executable, "-m", "hatchling", "version"
    assert run(*version) == "0.0.0"
    git = "git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"
    for command in (["init"], ["add", "."], ["commit", "--message", "first"], ["tag", "v1.2.3"]):
        run(*git, *command)
    assert run(*version) == "1.2.3"


def test_wheel_ships_every_module_the_typed_marker_and_the_licence(built):
    (wheel,) = built.glob("*.whl")
    names, source = set(zipfile.ZipFile(wheel).namelist()), ROOT / "src"
    assert {str(path.relative_to(source)) for suffix in ("py", "json") for path in source.rglob(f"*.{suffix}")} <= names
    assert "stem_attention/py.typed" in names
    (license_name,) = (name for name in names if name.endswith("licenses/LICENSE"))
    text = zipfile.ZipFile(wheel).read(license_name).decode()
    assert len(text) > 11_000
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"stem_attention"}


def test_source_archive_can_be_tested(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    needed = {"LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "tests/test_packaging.py", "evals/pyproject.toml"}
    assert needed <= names
    assert not any("__pycache__" in name or name.startswith("evidence/") for name in names)


def test_make_fetches_the_model_that_the_command_asks_for():
    assert f"MODEL := {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}\n" in (ROOT / "Makefile").read_text()
