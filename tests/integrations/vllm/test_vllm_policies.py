"""Any policy can be served, also one that a user wrote."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention import Mass
from stem_attention.integrations.vllm import counters

from .served import generate, prompts

NEAREST = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from stem_attention import BlockSelection, Policy


@dataclass(frozen=True)
class Nearest(Policy):
    name: ClassVar[str] = "nearest"
    block_size: int = 64
    blocks: int = 2

    def __call__(self, q, k, v, *, scale=None, prompt_len=None):
        size, q_len, kv_len = self.block_size, q.shape[1], k.shape[1]
        rows = torch.arange((kv_len - q_len) // size, -(-kv_len // size), device=q.device)[:, None]
        columns = torch.arange(-(-kv_len // size), device=q.device)
        mask = (columns <= rows) & ((columns == 0) | (columns > rows - self.blocks))
        mask = mask.expand(q.shape[0], q.shape[2], -1, -1)
        return BlockSelection.from_mask(mask, block_size=size, q_len=q_len, kv_len=kv_len)
"""


def served(policy: Any) -> dict[str, Any]:
    return {"policy": policy, "dense_below": 0, "min_query_len": 32}


def test_the_default_is_keep_by_mass(llama, engine, calls):
    generate(engine(llama, {"dense_below": 0}), prompts(700), tokens=1)
    assert [call.policy for call in calls] == [Mass()] * 2


@pytest.mark.parametrize("spec", ["paper", "longformer:block_size=64", "xattention"])
def test_a_policy_is_served_in_chunks_by_its_name(spec, llama, engine, calls):
    generate(engine(llama, served(spec), max_num_batched_tokens=300), prompts(700, 310), tokens=2)
    assert len({call.policy for call in calls}) == 1
    assert counters()["sparse_tokens"] == 1010


def test_a_users_own_class_is_served(llama, tmp_path, engine, monkeypatch):
    (tmp_path / "users_policies.py").write_text(NEAREST)
    monkeypatch.syspath_prepend(tmp_path)
    window = "sink-window:block_size=64,sink_blocks=1,window_blocks=2"
    same = generate(engine(llama, served(window), max_num_batched_tokens=300), prompts(700, 310))
    for own in ("users_policies:Nearest", {"policy": "users_policies:Nearest", "blocks": 2}):
        assert generate(engine(llama, served(own), max_num_batched_tokens=300), prompts(700, 310)) == same
    assert 0.2 < counters()["density"] < 0.9
    assert generate(engine(llama), prompts(700, 310)) != same, "what is left out matters to this model"
