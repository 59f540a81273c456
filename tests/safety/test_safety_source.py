"""What the library's source never does: unpickle, evaluate text, reach a network, start programs, load unsafe formats."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.toys import save, toy

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "src" / "stem_attention", ROOT / "evals" / "stem_evals"]

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "xml", "code", "codeop", "runpy",
    "socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib",
    "xmlrpc", "socketserver", "huggingface_hub", "ctypes", "cffi", "pty", "subprocess",
}  # fmt: skip
# ctypes is asked whether a driver is installed; the hub, for a model that is named by its id there, whether it answers.
# Measurements start git, to put the commit on record, and a new Python, to time a first call.
ALLOWED_MODULES = {
    "stem_attention/backends/triton/offline.py": {"ctypes"},
    "stem_attention/models/load.py": {"huggingface_hub"},
    "stem_evals/facts.py": {"subprocess"},
    "stem_evals/bench/ttft_first.py": {"subprocess"},
}

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("torch.hub", "load"), ("os", "system"), ("os", "popen"), ("os", "chmod"),
    ("os", "umask"), ("tempfile", "mktemp"), ("torch.package", "PackageImporter"), ("numpy", "load"), ("np", "load"),
}  # fmt: skip
FORBIDDEN_KEYWORDS = {("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True), ("shell", True)}


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def faults(path, text):
    """One line for each thing that must not be there."""
    allowed = ALLOWED_MODULES.get(path, set())
    for node in ast.walk(ast.parse(text)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        for name in imported(node):
            if name.partition(".")[0] in FORBIDDEN_MODULES - allowed or tuple(name.rsplit(".", 1)) in FORBIDDEN_ATTRIBUTES:
                yield f"{where} imports {name}"
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield f"{where} names {node.id}"
        if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in FORBIDDEN_ATTRIBUTES:
            yield f"{where} names {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in FORBIDDEN_KEYWORDS:
                    yield f"{where} passes {keyword.arg}={keyword.value.value}"
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = [ast.unparse(target) for target in node.targets]
            yield from (f"{where} changes {target}" for target in targets if target.startswith("os.environ"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_source_does_nothing_of_the_kind(source):
    paths = sorted(source.rglob("*.py"))
    assert len(paths) > 20
    assert [fault for path in paths for fault in faults(str(path.relative_to(source.parent)), path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import urllib.request", "from requests import get", "import yaml",
        "def late():\n    import socket", "import subprocess", "import torch\ntorch.load('x')", "from torch import load",
        "eval('1')", "exec('x = 1')", "f = eval", "import os\nos.system('ls')", "model(trust_remote_code=True)",
        "read(weights_only=False)", "run('ls', shell=True)", "import os\nos.environ['TRITON_CACHE_DIR'] = '/tmp'",
        "from os import system", "import huggingface_hub",
    ],
)  # fmt: skip
def test_a_planted_line_is_found(line):
    assert list(faults("stem_attention/api.py", line))


# Every way out of a process; a local socket pair, as event loops make, is none.
WITHOUT_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
for name in ("connect", "connect_ex", "bind", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, refuse)
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
import stem_attention
skipped = ("triton", "hopper", "fa4", "vllm", "sglang", "__main__")
names = [module.name for module in pkgutil.walk_packages(stem_attention.__path__, "stem_attention.")]
names = [name for name in names if not any(part.startswith(skipped) for part in name.split("."))]
for name in names:
    importlib.import_module(name)
assert len(names) > 60
"""


def python(code, *arguments, cwd, **environment):
    command = [sys.executable, "-c", WITHOUT_NETWORK + code, *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_importing_reaches_no_network(tmp_path):
    ran = python(IMPORT_EVERYTHING, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.iterdir()) == []  # nor does it leave anything behind


def test_the_block_on_the_network_blocks(tmp_path):
    assert "network: " in python("import urllib.request as u\nu.urlopen('http://127.0.0.1:9')", cwd=tmp_path).stderr
    assert "network: " in python("import socket\nsocket.create_connection(('localhost', 9))", cwd=tmp_path).stderr


def test_building_reaches_no_network(tmp_path):
    code = """
import sys, os
os.chdir(sys.argv[1])
from hatchling.build import build_wheel
print(build_wheel(sys.argv[2]))
"""
    ran = python(code, str(ROOT), str(tmp_path), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("stem_attention-")


def test_reading_a_prompt_with_a_local_model_reaches_no_network(tmp_path):
    pytest.importorskip("transformers")
    code = """
import sys
from stem_attention.cli import main
print("code", main(["run", "--model", sys.argv[1], "--context", "600", "--max-new-tokens", "1"]))
print("code", main(["doctor"]))
"""
    ran = python(code, str(save(toy("llama"), tmp_path / "model")), cwd=tmp_path)
    assert "code 3" in ran.stdout, ran.stderr  # a random model does not find the number
    assert "code 0" in ran.stdout, ran.stderr


def test_there_is_no_code_that_runs_at_build_time():
    assert not (ROOT / "setup.py").exists()
    assert not (ROOT / "hatch_build.py").exists()
    assert "hooks.custom" not in (ROOT / "pyproject.toml").read_text()
