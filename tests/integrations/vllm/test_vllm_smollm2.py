"""A real model in vLLM: SmolLM2 answers from a prompt that was read sparsely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention.integrations.vllm import counters
from stem_attention.models.load import EMBEDDED_INSTALL, embedded_gguf, find_model, load_model
from stem_attention.models.prompts import Prompt, planted_prompt

from .served import KEEP_ALL, generate

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(embedded_gguf() is None, reason=f"needs the embedded model: {EMBEDDED_INSTALL}"),
]
CACHE = {"kv_cache_memory_bytes": 1 << 28}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The model in vLLM's format, and its tokenizer."""
    loaded, tokenizer = load_model(find_model(), torch.device("cpu"), torch.bfloat16)
    fields = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        model: Any = type(loaded)(type(loaded.config)(**fields))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    path = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(path)
    return path, tokenizer


@pytest.fixture(scope="module")
def needle(smollm2: tuple[Path, Any]) -> Prompt:
    return planted_prompt(smollm2[1], 2500, seed="vllm", depth=0.4)


def test_a_needle_is_found_in_a_prompt_read_sparsely_in_chunks(smollm2, needle, engine):
    path, tokenizer = smollm2
    llm = engine(path, {"policy": "stem", "dense_below": 0}, dtype="bfloat16", max_num_batched_tokens=1000, **CACHE)
    (tokens,) = generate(llm, [list(needle.ids)], tokens=16)
    assert needle.answers[0] in tokenizer.decode(tokens), tokenizer.decode(tokens)
    count = counters()
    assert count["sparse_rows"] == 3
    assert count["density"] < 0.65


def test_keep_all_gives_the_hosts_tokens(smollm2, needle, engine):
    asked = [list(needle.ids)[-800:], list(needle.ids)[-333:]]
    expected = generate(engine(smollm2[0], **CACHE), asked)
    assert generate(engine(smollm2[0], KEEP_ALL, max_num_batched_tokens=301, **CACHE), asked) == expected
    assert counters()["sparse_tokens"] > 1000
