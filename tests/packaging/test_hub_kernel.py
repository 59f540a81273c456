"""The copy of the library that Hugging Face's `kernels` loads works without the library, and by the hub's own loader."""

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
swapped = [x.transpose(1, 2) for x in (q, k, v)]
dense = torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True, enable_gqa=True).transpose(1, 2)
assert torch.allclose(kernel.stem_attention(q, k, v, policy="dense:block_size=64", dense_below=0), dense, atol=1e-5)
assert kernel.select_blocks(q, k, v, policy=kernel.Stem(block_size=64)).density() < 1
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
    for cache in ("dynamic", "static"):
        with kernel.use_policy("dense:block_size=64", dense_below=0, observer=seen.append):
            same = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        assert torch.equal(same, answer), cache
        assert [call.reason for call in seen[:2]] == ["prefill", "prefill"], cache
        seen.clear()
    with kernel.use_policy("stem:block_size=64", dense_below=0, observer=seen.append):
        sparse = model(ids).logits
        model(ids, attention_mask=(torch.arange(600) >= 100).long()[None])
    assert 0 < (sparse - dense).abs().max() and seen[0].density < 1
    assert seen[-1].reason == "custom mask"
    model.set_attn_implementation("stem")
    kernel.set_policy(model, "stem:block_size=64", dense_below=0)
    assert model.config.stem_attention["policy"]["policy"] == "stem"
    assert torch.equal(model(ids).logits, sparse)
print("loaded by kernels")
"""


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", PARENT + code, *arguments]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "packaging" / "hub_kernel.py", directory], check=True, capture_output=True)
    return directory


def test_copy_works_without_the_library(hub):
    """It holds no absolute import and no cache."""
    files = [path for path in hub.rglob("*") if path.is_file()]  # before Python keeps a cache beside them
    assert re.fullmatch(r"hub-[0-9a-f]{8}", run(ALONE, hub))
    assert {path.suffix for path in files} == {".py", ".json"}
    absolute = re.compile(r"^\s*(from|import) stem_attention", re.MULTILINE)
    assert [path for path in files if absolute.search(path.read_text())] == []


def test_transformers_loads_it_through_kernels(hub):
    pytest.importorskip("kernels", reason="make test-hub-kernel installs kernels beside the transformers that takes it")
    assert version("transformers") == "5.17.0", "newer transformers ask for a kernels that is not published"
    local = {"LOCAL_KERNELS": f"owner/stem-attention={hub}", "HF_HUB_OFFLINE": "1"}
    assert run(THROUGH_TRANSFORMERS, **local) == "loaded by kernels"
