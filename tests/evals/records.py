"""Hand-made records, headers and bench settings, for tests of what is made of them."""

import copy
import json
from typing import Any

import torch

from stem_attention.models.shapes import Heads
from stem_attention.models.texts import Text
from stem_attention.policies import Policy, PolicySpec
from stem_evals.bench.setup import Setup

TEXT = Text("words", " ".join(f"{word} {word * word % 97}" for word in range(400)))
DENSITIES = {
    "dense": 1.0, "stem": 0.30, "stem@0.1": 0.1, "uniform": 0.31, "uniform@stem": 0.31, "window": 0.29,
    "oracle": 0.5, "oracle@stem": 0.3, "uniform@0.5": 0.5, "wide": 0.52, "all": 1.0,
}  # fmt: skip
FAMILIES = {name: name.partition("@")[0] for name in DENSITIES}
HEADER: dict[str, Any] = {
    "format": 1, "model": {"name": "small", "sha256": "aa", "revision": None}, "dtype": "float32", "device": "cpu",
    "texts": {"austen": {"sha256": "bb", "characters": 10}}, "settings": {"needle": {"seed": 0}},
    "contenders": {
        name: {"family": FAMILIES[name], "at": {"1024": {"density": density, "fields": {"beta": 0.2}}}}
        for name, density in DENSITIES.items()
    },
    "sessions": [{
        "command": "stem-evals eval needle", "started": "now", "commit": "c0ffee", "uncommitted": [], "threads": 1,
        "versions": {"torch": "2", "python": "3"},
    }],
}  # fmt: skip


def changed(*path: str, to: object) -> dict[str, Any]:
    """The header with another value in one place."""
    header = copy.deepcopy(HEADER)
    place = header
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return header


def needle(contender: str, sample: int = 0, share: float = 1.0, tokens: int = 1024, kind: str = "single", **more: Any) -> dict:
    hit = share == 1
    return {
        "measure": "needle", "case": f"{kind}-{tokens}-0.5-{sample}", "tokens": tokens, "contender": contender, "kind": kind,
        "depth": 0.5, "sample": sample, "planted": ["1"], "places": [0.5], "hits": [hit], "found": hit, "share": share,
        "density": DENSITIES[contender], "seconds": 0.1, **more,
    }  # fmt: skip


def perplexity(contender: str, start: int, loss: float) -> dict:
    means = {"loss": loss, "dense_loss": 2.0, "kl": abs(loss - 2), "same": 0.9}
    return {
        "measure": "perplexity", "case": f"austen-1024-{start}", "tokens": 1024, "contender": contender, "text": "austen",
        "start": start, "predicted": 1023, **means, "density": DENSITIES[contender], "seconds": 0.1,
        "buckets": [{"first": 1, "last": 511, **means}, {"first": 512, "last": 1023, **means}],
    }  # fmt: skip


def bench_setup(policy: Policy, **changes: Any) -> Setup:
    """Few heads on the CPU, and a progress bar that nobody sees."""
    known = {
        "spec": PolicySpec(policy.name, policy), "lengths": [256], "heads": Heads(2, 1, 32), "dtype": torch.float32,
        "device": torch.device("cpu"), "dense_below": 0, "repeats": 1, "seed": 0, "dense": True,
        "start": lambda *_: lambda: None,
    }  # fmt: skip
    return Setup(**{**known, **changes})


def through_json(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))
