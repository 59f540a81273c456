"""Time whole training steps of a language model with random weights, dense and sparse, and tell what memory they take.

    python benchmarks/train_step.py --tokens 32768 131072 --json steps.json      # Llama-3.2-1B's shape on one GPU

A step is the forward pass, the loss of all tokens, the backward pass and AdamW, in bf16 with gradient checkpointing. Logits are
made and forgotten a slice of tokens at a time, or they alone would fill the memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from stem_attention.integrations.transformers import set_policy, use_policy  # importing it registers "stem"

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97,
}  # fmt: skip
DENSE = {"sdpa": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SLICE = 4096  # tokens whose logits exist at a time


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of every token but the first, given those before it."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]

    def total(part: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.lm_head(part).float(), labels, reduction="sum")

    pairs = zip(hidden.split(SLICE), ids[0, 1:].split(SLICE), strict=True)
    return sum(checkpoint(total, *pair, use_reentrant=False) for pair in pairs) / len(hidden)


def measure(shape: dict, tokens: int, attention: str, policy: str, steps: int, device: torch.device) -> dict:
    """Seconds of a step, gigabytes at most, the loss, and what a sparse model keeps."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, max_position_embeddings=tokens)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).train()
    sparse = attention == "stem"
    model.set_attn_implementation("stem" if sparse else "sdpa")
    if sparse:
        set_policy(model, policy)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    ids = torch.randint(shape["vocab_size"], (1, tokens), device=device)
    densities: list[float] = []
    if sparse:
        with torch.no_grad(), use_policy(observer=lambda call: densities.append(call.density)):
            model.model(input_ids=ids, use_cache=False)
    seconds, kernel = [], DENSE.get(attention)
    with nullcontext() if kernel is None else sdpa_kernel([kernel]):
        for step in range(1 + steps):
            if step == 1 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()  # waits for the GPU
            seconds.append(time.perf_counter() - start)
    found = {"tokens": tokens, "attention": attention, "seconds": statistics.median(seconds[1:]), "loss": value}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found | ({"policy": policy, "density": statistics.mean(densities)} if sparse else {})


def main() -> None:
    """Measure every length with every kind of attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--attention", nargs="+", choices=[*DENSE, "stem"], default=["cudnn", "stem"])
    parser.add_argument("--policy", nargs="+", default=["mass"], help="what sparse attention keeps; several run one by one")
    parser.add_argument("--steps", type=int, default=3, help="steps behind the first, whose median counts")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, to try the script")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": TINY if args.tiny else SHAPE,
    }
    runs = []
    for tokens in args.tokens:
        for attention in args.attention:
            for policy in args.policy if attention == "stem" else [""]:
                runs.append(measure(about["shape"], tokens, attention, policy, args.steps, device))
                print(runs[-1], flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps({**about, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
