"""Cost of small prefill steps in vLLM's CPU build: density, loss and attention time against max_num_batched_tokens.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_chunks.py --out evidence/vllm-chunks-cpu.json

Prints the numbers of docs/vllm.md. SmolLM2 reads one window of source code. Every budget starts three engines: on vLLM's own
attention, with Stem, and with Stem where the runner does not tell how long prompts are.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
import vllm
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from stem_attention import backends
from stem_attention.integrations.vllm import NAME, host
from stem_attention.integrations.vllm.cpu import StemCPUImpl
from stem_attention.models.load import find_model, load_model
from stem_attention.models.texts import TokenizedText, stdlib_text

spent: list[float] = []
blocks = [0, 0]


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


def counted(call: Any) -> Any:
    """Count the blocks that a call keeps, off the clock, and run it."""
    start = time.process_time()
    for i in range(call.batch.sequences):
        selection = backends.select(call.only(i))
        blocks[0] += int(selection.counts.sum())
        blocks[1] += selection.grid.causal_pairs * selection.counts.shape[1]
    spent.append(start - time.process_time())
    return backends.run(call)


def measure(model: str, prompt: list[int], budget: int, stem: bool) -> dict[str, float]:
    """Read one prompt; CPU seconds of attention, density of the sparse steps, mean loss of its tokens in nats."""
    llm = vllm.LLM(
        model, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, max_model_len=len(prompt) + 8, max_num_seqs=4,
        max_num_batched_tokens=budget, enable_prefix_caching=False, **({"attention_backend": NAME} if stem else {}),
    )  # fmt: skip
    spent.clear()
    blocks[:] = 0, 0
    greedy = vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    losses = [-next(iter(found.values())).logprob for found in output.prompt_logprobs[1:]]
    del llm, output
    gc.collect()
    density = blocks[0] / blocks[1] if blocks[1] else 1.0
    return {"seconds": round(sum(spent), 2), "density": round(density, 4), "loss": round(sum(losses) / len(losses), 5)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=6144)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048, 6144])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    loaded, tokenizer = load_model(find_model(), torch.device("cpu"), torch.bfloat16)
    prompt = TokenizedText(tokenizer, stdlib_text()).window(0, asked.length)
    fields = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    plain: Any = type(loaded)(type(loaded.config)(**fields)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    timed(StemCPUImpl)
    timed(CPUAttentionBackendImpl)
    host.run = counted
    known, rows = host.prompt_lengths, []
    with tempfile.TemporaryDirectory() as model:
        plain.save_pretrained(model)
        print("| max_num_batched_tokens | density, lengths known | not known | loss, vLLM's own | known | not known | "
              "CPU s, vLLM's own | Stem |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
        for budget in asked.budgets:
            row: dict[str, Any] = {"budget": budget, "dense": measure(model, prompt, budget, stem=False)}
            for name, lengths in (("known", known), ("unknown", lambda: None)):
                host.prompt_lengths = lengths
                row[name] = measure(model, prompt, budget, stem=True)
            rows.append(row)
            dense, told, untold = row["dense"], row["known"], row["unknown"]
            print(
                f"| {budget} | {told['density']:.3f} | {untold['density']:.3f} | {dense['loss']:.4f} | {told['loss']:.4f} | "
                f"{untold['loss']:.4f} | {dense['seconds']:.1f} | {told['seconds']:.1f} |",
                flush=True,
            )
    if asked.out is not None:
        versions = {"vllm": vllm.__version__, "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        found = {"length": asked.length, "threads": torch.get_num_threads(), "versions": versions, "rows": rows}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
