"""The copy of the library that Hugging Face's `kernels` loads works without the library, and by the hub's own loader."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARENT = "import sys, torch; sys.modules['stem_attention'] = None; torch.set_num_threads(1); torch.manual_seed(0)\n"

ALONE = """
import importlib.util
spec = importlib.util.spec_from_file_location("_another_name", sys.argv[1] + "/build/torch-universal/__init__.py")
kernel = sys.modules["_another_name"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
q, k, v = (torch.randn(1, 600, heads, 32) for heads in (4, 2, 2))
everything = kernel.StemConfig(block_size=64, dense_below=0, ratio_short=1.0)
swapped = [x.transpose(1, 2) for x in (q, k, v)]
dense = torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True, enable_gqa=True).transpose(1, 2)
assert torch.allclose(kernel.stem_attention(q, k, v, config=everything), dense, atol=1e-5)
assert kernel.select_blocks(q, k, v, config=kernel.StemConfig(block_size=64)).density() < 1
assert "transformers" not in sys.modules
assert not any(name.startswith("stem_attention.") for name in sys.modules)
print(kernel.__version__)
"""

THROUGH_TRANSFORMERS = """
from kernels import get_kernel
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=2, max_position_embeddings=2048, **sizes)).eval()
ids = torch.randint(100, (1, 600))
kernel = get_kernel("owner/stem-attention", version=1)
seen = []
with torch.no_grad():
    dense, answer = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("owner/stem-attention", allow_all_kernels=True)
    assert model.config._attn_implementation == "owner/stem-attention"
    everything = kernel.StemConfig(block_size=64, dense_below=0, ratio_short=1.0)
    for cache in ("dynamic", "static"):
        with kernel.configure(everything, observer=seen.append):
            same = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        assert torch.equal(same, answer), cache
        assert [call.reason for call in seen[:2]] == ["prefill", "prefill"], cache
        seen.clear()
    with kernel.configure(kernel.StemConfig(block_size=64, dense_below=0), observer=seen.append):
        sparse = model(ids).logits
    assert 0 < (sparse - dense).abs().max() and seen[0].density < 1
    padded = torch.ones_like(ids)
    padded[:, :100] = 0
    with kernel.configure(everything, observer=seen.append):
        model(ids, attention_mask=padded)
    assert seen[-1].reason == "custom mask"
print("loaded by kernels")
"""


def run(code: str, *arguments: str | Path, **environment: str) -> str:
    command = [sys.executable, "-c", PARENT + code, *arguments]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "packaging" / "hub_kernel.py", directory], check=True, capture_output=True)
    return directory


def test_copy_works_without_the_library(hub: Path) -> None:
    assert re.fullmatch(r"hub-[0-9a-f]{8}", run(ALONE, hub))


def test_copy_holds_no_absolute_import_and_no_cache(hub: Path) -> None:
    files = [path for path in hub.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".json"}
    absolute = re.compile(r"^\s*(from|import) stem_attention", re.MULTILINE)
    assert [path for path in files if absolute.search(path.read_text())] == []


def test_transformers_loads_it_through_kernels(hub: Path) -> None:
    pytest.importorskip("kernels", reason="make test-hub-kernel installs kernels beside the transformers that takes it")
    assert version("transformers") == "5.17.0", "newer transformers ask for a kernels that is not published"
    local = {"LOCAL_KERNELS": f"owner/stem-attention={hub}", "HF_HUB_OFFLINE": "1"}
    assert run(THROUGH_TRANSFORMERS, **local) == "loaded by kernels"
