"""What small prefill steps cost in vLLM: Stem's density and attention time against max_num_batched_tokens, on the CPU build.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_chunks.py

Prints the table of docs/vllm.md. One prompt, a random Llama; every budget starts two engines, one on the host's own attention.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
import transformers
import vllm
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from stem_attention.integrations.vllm import counters, reset_counters
from stem_attention.integrations.vllm_cpu import StemCPUImpl

SIZES = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
spent: list[float] = []


def timed(cls: type) -> None:
    """Add up the time of a class's attention."""
    forward = cls.forward

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not cls:  # the host's part of a step that Stem times as a whole
            return forward(self, *args, **kwargs)
        start = time.process_time()
        try:
            return forward(self, *args, **kwargs)
        finally:
            spent.append(time.process_time() - start)

    cls.forward = run


def measure(model: str, length: int, budget: int, stem: bool) -> float:
    """CPU seconds of attention for one prompt."""
    settings = {"stem_attention": {"min_query_len": 32}}
    options = {"attention_backend": "CUSTOM", "additional_config": settings} if stem else {}
    llm = vllm.LLM(
        model, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, max_model_len=length + 8, max_num_seqs=4,
        max_num_batched_tokens=budget, enable_prefix_caching=False, **options,
    )  # fmt: skip
    greedy = vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    prompt = torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    reset_counters()
    spent.clear()
    llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return sum(spent)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=8000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 500, 512, 1024, 2048, 4096, 8192])
    asked = parser.parse_args()
    timed(StemCPUImpl)
    timed(CPUAttentionBackendImpl)
    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=2, max_position_embeddings=2 * asked.length, **SIZES)
    with tempfile.TemporaryDirectory() as model:
        transformers.LlamaForCausalLM(config).save_pretrained(model)
        print("| max_num_batched_tokens | density | block pairs read | sparse tokens | Stem, CPU s | vLLM's own, CPU s |")
        print("|---|---|---|---|---|---|")
        for budget in asked.budgets:
            host = measure(model, asked.length, budget, stem=False)
            sparse = measure(model, asked.length, budget, stem=True)
            count = counters()
            share = count["sparse_tokens"] / asked.length
            print(
                f"| {budget} | {count['density']:.3f} | {count['kept_blocks']} | {share:.1%} | {sparse:.2f} | {host:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
