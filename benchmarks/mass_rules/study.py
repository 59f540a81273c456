"""Read windows of texts under every rule at equal density, and one text's end behind more and more context.

    cd benchmarks && python -m mass_rules.study --model qwen15.gguf --text austen.txt --text code.txt --out mass-15b.jsonl

Records are JSON lines, by ``study``: ``tuned``, the share of a rule that keeps what ``Mass`` keeps; ``rules``, whole windows;
``growth``, the last tokens of a text, with the YaRN that the Qwen2.5 family documents for prompts beyond 32768 tokens. A GPU
that holds 131072 tokens needs three minutes for two windows of each text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from mass_rules.corrections import corrected
from mass_rules.rules import RULES, Variant
from torch import Tensor

from stem_attention import Mass, Policy, select_blocks
from stem_attention.models.load import find_model, load_model
from stem_attention.models.prefill import read
from stem_attention.models.texts import Text, TokenizedText, tokenized
from stem_evals.perplexity import TextReading, logits_of, read_text

SHARES = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
EQUAL = (4.0, 8.0)
"""Shares of Mass whose densities every rule is tuned to."""
YARN = 4

Record = dict[str, Any]
Calls = list[tuple[int, Tensor, Tensor, Tensor, float]]
"""Layer, queries, keys, values and scale."""
Contenders = dict[str, tuple[Policy, str | None]]
"""Policy, and correction of its output, by name."""


def captured(model: Any, ids: list[int]) -> Calls:
    """Every second layer's call of a dense prefill."""
    kept: Calls = []

    def keep(call: Any) -> None:
        if call.layer % 2 == 0:
            kept.append((call.layer, *(x.transpose(1, 2) for x in (call.q, call.k, call.v)), call.scale))

    read(model, ids, None, dense_below=0, positions=1, on_attention=keep)
    return kept


def density(policy: Mass, calls: Calls) -> float:
    """What the policy keeps of the calls, on average."""
    return fmean(
        select_blocks(q, k, v, policy=policy.for_layer(layer), scale=scale).density() for layer, q, k, v, scale in calls
    )


def tuned(policy: Mass, target: float, calls: Calls) -> tuple[Mass, float]:
    """The policy with the share that keeps ``target`` of the calls' blocks, and what it keeps, by secants of logarithms."""
    found: dict[float, float] = {}
    share, slope = policy.share, -0.5
    for _ in range(6):
        found[share] = density(replace(policy, share=share), calls)
        (near, kept), *others = sorted(found.items(), key=lambda pair: abs(math.log(pair[1] / target)))
        if abs(math.log(kept / target)) < 0.004:
            break
        if others and others[0][1] != kept:
            slope = math.log(others[0][1] / kept) / math.log(others[0][0] / near)
        share = near * math.exp(math.log(target / kept) / min(-0.15, max(-2.0, slope)))
    return replace(policy, share=near), kept


def contenders(model: Any, calls: Calls) -> Iterator[tuple[str, Policy, str | None, Record]]:
    """Mass at several shares, its blocks with a correction, and each rule tuned on the calls: name, both, and a record."""
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    steep = tuple((0.5 if layer < layers // 2 else 2.0,) * heads for layer in range(layers))
    ideas: dict[str, Mass] = {
        **{rule: Variant(rule=rule) for rule in RULES if rule != "mass"},
        "spread1": Mass(spread=1.0, share=6.0),
        "keys16": Variant(key_pool=16),
        "queries8-keys16": Variant(query_pool=8, key_pool=16),
        "steep-layers": Mass(head_factors=steep),
    }
    for share in SHARES:
        yield f"mass:share={share}", Mass(share=share), None, {"share": share}
    for share in EQUAL:
        target = density(Mass(share=share), calls)
        for kind in ("delta", "residual"):
            yield f"{kind}@{share:g}", Mass(share=share), kind, {"share": share}
        for name, policy in ideas.items():
            found, kept = tuned(replace(policy, share=policy.share * share / 4), target, calls)
            yield f"{name}@{share:g}", found, None, {"share": found.share, "density": kept, "target": target}


@torch.inference_mode()
def means(model: Any, ids: list[int], dense: TextReading, other: TextReading, last: int) -> Record:
    """Loss, dense loss and divergence in nats a token over the last positions of a window, and its cost."""
    targets = torch.tensor(ids[-last:], device=other.hidden.device)
    sums = torch.zeros(3, dtype=torch.float64)
    for low in range(0, last, 256):
        wanted = targets[low : low + 256, None]
        before, after = (x.hidden[-last - 1 + low : -last - 1 + low + len(wanted)] for x in (dense, other))
        p = logits_of(model, before).log_softmax(-1)
        q = p if other is dense else logits_of(model, after).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum()
        sums += torch.stack([-q.gather(1, wanted).sum(), -p.gather(1, wanted).sum(), kl]).cpu()
    loss, dense_loss, kl = (sums / last).tolist()
    reading = other.reading
    cost = {"density": reading.density, "seconds": reading.seconds, "attention_seconds": sum(reading.attention_seconds)}
    return {**cost, "predicted": last, "loss": loss, "dense_loss": dense_loss, "kl": kl}


def read_all(model: Any, ids: list[int], policies: Contenders, last: int) -> Iterator[Record]:
    """A window under dense attention and under every contender."""
    dense = read_text(model, ids, None)
    yield {"tokens": len(ids), "contender": "dense", **means(model, ids, dense, dense, last)}
    for name, (policy, correction) in policies.items():
        with corrected(correction):
            other = read_text(model, ids, policy)
        yield {"tokens": len(ids), "contender": name, **means(model, ids, dense, other, last)}


def rules(model: Any, texts: dict[str, TokenizedText], tokens: int, windows: int) -> Iterator[Record]:
    """Every rule over the same windows; the windows on which rules are tuned lie between them."""
    calls: Calls = []
    for text in texts.values():
        first, second, *_ = text.starts(tokens, windows)
        calls += captured(model, text.window((first + second) // 2, tokens))
    policies: Contenders = {}
    for name, policy, correction, about in contenders(model, calls):
        policies[name] = policy, correction
        yield {"study": "tuned", "contender": name, **about}
    calls.clear()
    for index in range(windows):
        for name, text in texts.items():
            start = text.starts(tokens, windows)[index]
            for record in read_all(model, text.window(start, tokens), policies, tokens - 1):
                yield {"study": "rules", "text": name, "start": start, **record}


def growth(model: Any, texts: dict[str, TokenizedText], lengths: list[int], ends: int) -> Iterator[Record]:
    """The last half of the shortest length, read behind more and more of the text before it, with YaRN at every length."""
    config, rotary = model.config, type(model.model.rotary_emb)
    trained = config.max_position_embeddings
    yarn = {"rope_type": "yarn", "factor": float(YARN), "original_max_position_embeddings": trained}
    config.rope_parameters = {**copy.deepcopy(config.rope_parameters), **yarn}
    config.max_position_embeddings = trained * YARN
    model.model.rotary_emb = rotary(config=config).to(model.device)
    for name, text in texts.items():
        for start in text.starts(max(lengths), ends):
            end = start + max(lengths)
            for tokens in lengths:
                shares = (4.0, 8.0, 16.0, *((32.0,) if tokens in lengths[-2:] else (2.0,) if tokens == lengths[0] else ()))
                policies: Contenders = {f"mass:share={share}": (Mass(share=share), None) for share in shares}
                for record in read_all(model, text.window(end - tokens, tokens), policies, lengths[0] // 2):
                    yield {"study": "growth", "yarn": YARN, "text": name, "end": end, **record}


def main() -> None:
    """Write the records as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, a GGUF file, or a hub id")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384, help="of a window under the rules")
    parser.add_argument("--windows", type=int, default=5, help="of each text under the rules")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--ends", type=int, default=2, help="of each text, read behind more and more context")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(find_model(args.model), torch.device(args.device), getattr(torch, args.dtype))
    texts = tokenized(tokenizer, [Text(path.name, path.read_text(encoding="utf-8")) for path in args.text])
    with args.out.open("a", encoding="utf-8") as file:
        for part in (rules(model, texts, args.tokens, args.windows), growth(model, texts, args.lengths, args.ends)):
            for record in part:
                print(json.dumps(record), file=file, flush=True)


if __name__ == "__main__":
    main()
