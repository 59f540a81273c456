"""On a GPU: what `stem-attention compile` made where no GPU is seen, real calls find in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from .common import RULES, on_gpu

pytestmark = on_gpu

CALLS = """
import json, sys, torch
from triton import knobs
from stem_attention import stem_attention
found = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append((src.name, cache_hit))
for length in (8192, 8200, 8191, 12345, 16384):
    q = torch.randn(1, length, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    stem_attention(q, k, v, policy=sys.argv[1], dense_below=0)
torch.cuda.synchronize()
print(json.dumps(found))
"""


def run(command, cache, **environment):
    done = subprocess.run(
        command, env={**os.environ, "TRITON_CACHE_DIR": str(cache), **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RULES)
def test_a_real_call_compiles_nothing_after_the_command(name, tmp_path):
    major, minor = torch.cuda.get_device_capability()
    file = tmp_path / "policy.json"
    file.write_text(RULES[name](32).to_json())
    command = [sys.executable, "-m", "stem_attention.cli", "compile", "--arch", f"sm{major}{minor}", "--lengths", "8192,16384"]
    made = run([*command, "--policy", str(file), "--json"], tmp_path, CUDA_VISIBLE_DEVICES="")["kernels"]
    assert made
    assert not any(kernel["cached"] for kernel in made)
    found = run([sys.executable, "-c", CALLS, str(file)], tmp_path)
    assert {name for name, _ in found} == {kernel["kernel"] for kernel in made}
    assert [name for name, hit in found if not hit] == []
