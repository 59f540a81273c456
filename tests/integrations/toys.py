"""Models of every class of transformers that builds at toy size, and what each does on "stem".

`python -m tests.integrations.toys` writes the table into docs/transformers.md, and prints what is wrong.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stem_attention import UnsupportedError

from .tiny import KEEP_ALL, hosts, transformers

auto = pytest.importorskip("transformers.models.auto.modeling_auto")

MAPPINGS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "vision-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}
LENGTH = 96
LARGEST = 2_500_000  # parameters; some towers have sizes that no name tells
PADDING = torch.stack([torch.arange(LENGTH) >= start for start in (0, 20)])
PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"

# Sizes by what a field of a config is called; the first pattern counts, and a size is never raised.
SIZES = {
    r"dropout|temporal|channels|window|chunk|interval|every|layerdrop|num_labels|types|shared|first_k|skip": None,
    r"^num_nextn|_ids$|sparse_step|swa|proj_factor": None,
    r"vocab": 128,
    r"max_position_embeddings|^n_positions|max_seq|seq_length|max_\w+_positions|n_ctx|context_length": 256,
    r"head_dim|^d_kv$|^rotary_dim$": 8,
    r"(key_value|kv)_heads|^n_head_kv$": 2,
    r"heads$|^n_head$|^num_heads": 4,
    r"layers?$|^depths?$|^num_blocks$|period$": 2,
    r"offset$": 1,
    r"lora_rank$": 8,
    r"experts_per_tok|top_?k$|^num_selected_experts|^moe_k$|^n_group$|^topk_group$": 2,
    r"experts$": 4,
    r"intermediate_size|ffn|^d_ff$|^n_inner$|mlp_dim": 48,
    r"hidden_size|hidden_dim|embed_dim|embedding_size|^d_model$|^n_embd$|^width$|dim$": 32,
    r"^image_size$": 32,
    r"^patch_size$": 8,
}
VALUES = {
    "initializer_range": 0.2, "init_std": 0.2, "initializer_factor": 4.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "image_token_id": 120, "image_token_index": 120, "video_token_id": 121,
    "is_decoder": True,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
OF_CLASSES = {
    r"RecurrentGemmaConfig": {"num_hidden_layers": 3},
    r"SmolLM3Config": {"no_rope_layers": [1, 0]},
    r"BambaConfig": {"attn_layer_indices": [1]},
    r"GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    r"GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    r"(Qwen2(_5)?_?VL|Qwen2_5Omni|Glm4v|Glm46V|GlmOcr|PaddleOCR).*Text.*Config": ROPE,
}
# Where just some layers have a window or chunk, it is so small that the prompt leaves it. One that all layers have is not.
WINDOWS, WINDOW = ("sliding_window", "sliding_window_size", "attention_chunk_size"), 48
WHERE_NONE = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def toy_config(config_class: Any) -> Any:
    """A config of toy sizes, its parts too, with a layer of each kind that the class has."""
    standard, names = config_class(), {each.name: each.default for each in dataclasses.fields(config_class)}
    sizes: dict[str, Any] = {name: value for name, value in VALUES.items() if name in names}
    for name, value in names.items():
        size = next((size for pattern, size in SIZES.items() if re.search(pattern, name)), None)
        if size is not None and isinstance(value, int) and not isinstance(value, bool) and value > size:
            sizes[name] = size
        elif value is None and getattr(standard, name, None) is None and name in WHERE_NONE:
            sizes[name] = WHERE_NONE[name]
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in config_class.sub_configs:
        if isinstance(part := getattr(standard, name), transformers.PreTrainedConfig):
            sizes[name] = toy_config(type(part))
    if "layer_types" in names and getattr(standard, "layer_types", None):
        kinds = list(dict.fromkeys(standard.layer_types))
        sizes["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
        if len(kinds) > 1:
            sizes |= {name: WINDOW for name in WINDOWS if getattr(standard, name, None)}
    for pattern, values in OF_CLASSES.items():
        if re.fullmatch(pattern, config_class.__name__):
            sizes |= values
    return config_class(**sizes)


def classes() -> Iterator[tuple[str, Any]]:
    """Every class with its kind, once."""
    for kind, mapping in MAPPINGS.items():
        found = (each for entry in mapping.values() for each in (entry if isinstance(entry, tuple) else (entry,)))
        yield from ((kind, each) for each in sorted(set(found), key=lambda each: str(each.__name__)))


def build(model_class: Any, attention: str | None) -> Any:
    """A toy model, the same weights every time; `None` for the host's own attention."""
    config = toy_config(model_class.config_class)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in model_class._from_config(config, attn_implementation="eager").parameters())
    if parameters > LARGEST:
        raise MemoryError(f"{parameters} parameters")
    return seeded(model_class, toy_config(model_class.config_class), attention)


def seeded(model_class: Any, config: Any, attention: Any) -> Any:
    torch.manual_seed(0)
    options = {} if attention is None else {"attn_implementation": attention}
    return model_class._from_config(config, **options).eval()


def logits(model: Any, kind: str, last: int = 3, padded: bool = False) -> Tensor:
    """Logits of a fixed prompt whose last token is `last`, with or without padding at its left."""
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    text = ids.flip(1) if kind == "seq2seq" else ids
    text[:, -1] = last
    inputs = {"input_ids": ids, "use_cache": False}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = text
    if padded:
        inputs["attention_mask"] = PADDING.long()
    with torch.no_grad():
        out: Tensor = model(**inputs).logits.double()
    return out[PADDING] if padded and kind != "seq2seq" else out


def runs(model: Any, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a prompt, with padding, and with another last token."""
    return logits(model, kind), logits(model, kind, padded=True), logits(model, kind, last=60)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a class does on "stem"; of a decoder also why how many layers of its standard config do not run sparse, if known."""

    name: str
    runs: str
    why: str
    fault: str | None = None
    layers: Counter[str | None] = dataclasses.field(default_factory=Counter)


def kinds(config: Any) -> list[str]:
    """The kind of each layer of a config's text decoder, or nothing where they are all alike."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    return list(next(filter(None, found), []))


def layers(model: Any, calls: list[Any]) -> Counter[str | None]:
    """Why the layers of a class do not run sparse, None for those that do, by the calls of a toy that has all kinds of them."""
    why = {call.layer: None if call.sparse else call.reason for call in calls}
    toys, standard = kinds(model.config), kinds(type(model).config_class())
    if toys and standard:
        of_kind = {kind: why.get(layer, "no attention") for layer, kind in enumerate(toys)}
        if of_kind.get("chunked_attention") == "custom mask":  # which is how transformers says it
            of_kind["chunked_attention"] = "chunk of the prompt"
        return Counter(of_kind.get(kind, "another kind") for kind in standard)
    return Counter(why.values())


def examine(kind: str, model_class: Any) -> Row | None:
    """Compare a class on "stem", everything kept, with the host's own attention; None if the host cannot run it so."""
    name = model_class.__name__
    try:
        host = build(model_class, None)
        expected = runs(host, kind)
    except Exception:  # noqa: BLE001  # some classes want images, others sizes that fit each other
        return None
    calls: list[Any] = []
    try:
        stem = build(model_class, "stem")
        stem.load_state_dict(host.state_dict())
        with hosts.use_policy(KEEP_ALL, dense_below=0, observer=calls.append):
            logits(stem, kind)
            plain = list(calls)
            found = runs(stem, kind)
    except UnsupportedError as error:
        return Row(name, "refused", re.sub(r"^\w+ ", "", re.split("[:;]", str(error))[0]))
    unit, fault = expected[0].std(), None
    future, own = ((plain - changed)[:, :-1].abs().max() / unit for plain, _, changed in (found, expected))
    differences = [((a - b).abs().max() / unit).item() for a, b in zip(found, expected, strict=True)]
    if future > own + 1e-4:
        fault = f"{name} sees the future: {future:.1e}, the host {own:.1e}"
    elif not max(differences) < 1e-3:
        fault = f"{name} differs from the host: {differences}"
    dense = sorted({call.reason for call in calls if not call.sparse})
    if not calls:
        return Row(name, "dense", "no attention layer", fault)
    of_layers = layers(stem, plain) if kind == "causal" else Counter()
    return Row(name, "sparse" if any(call.sparse for call in calls) else "dense", ", ".join(dense), fault, of_layers)


@cache
def rows() -> list[Row]:
    """What every class does that builds."""
    return [row for kind, model_class in classes() if (row := examine(kind, model_class)) is not None]


def table() -> str:
    """The rows in Markdown, classes that do the same together."""
    names: dict[tuple[str, str], set[str]] = {}
    for row in rows():
        names.setdefault((row.runs, row.why), set()).add(row.name)
    order = sorted(names, key=lambda key: (["sparse", "dense", "refused"].index(key[0]), -len(names[key]), key[1]))
    why = {"sparse": "but for layers or calls with: ", "dense": "", "refused": ""}
    lines = [f"| {key[0]} | {key[1] and why[key[0]] + key[1]} | {', '.join(sorted(names[key]))} |" for key in order]
    return "\n".join(["| runs | why | classes |", "|---|---|---|", *lines])


def layer_table() -> str:
    """Decoders that run some of their layers sparse in Markdown, those that do the same together."""
    names: dict[tuple[str, str], set[str]] = {}
    for row in rows():
        sparse, total = row.layers[None], row.layers.total()
        if 0 < sparse < total:
            rest = ", ".join(f"{why} ({count})" for why, count in row.layers.most_common() if why is not None)
            names.setdefault((f"{sparse} of {total}", rest), set()).add(re.sub(r"For[A-Z]\w+$", "", row.name))
    lines = [f"| {', '.join(sorted(found))} | {share} | {rest} |" for (share, rest), found in names.items()]
    return "\n".join(["| decoder | sparse layers | the others |", "|---|--:|---|", *sorted(lines)])


def page() -> str:
    """docs/transformers.md with the tables of today."""
    text = PAGE.read_text()
    for name, made in (("layers", layer_table()), ("classes", table())):
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        assert mark, f"docs/transformers.md has lost its mark {name}"
        text = f"{before}{mark}{made}\n<!-- /{name} -->{rest.partition(f'<!-- /{name} -->')[2]}"
    return text


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    PAGE.write_text(page())
    print(*(row.fault for row in rows() if row.fault), f"{len(rows())} classes", sep="\n")
