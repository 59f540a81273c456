"""Whether a model made by train.py answers questions about long synthetic prompts, dense and under policies.

cd benchmarks && python -m stress.evaluate --model DIR --policy mass --policy paper --lengths 32768 --samples 20
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from stress.tasks import ANSWER, TASKS, Marker, Vocabulary, make_prompt
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stem_attention.errors import bad_argument
from stem_attention.models.load import find_model, load_model, take_stem
from stem_attention.models.prefill import read
from stem_attention.policies import PolicySpec, parse_spec

LAYOUT = "stress.json"
"""File beside a model's config.json that says which ids mean what."""


def evaluate(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    specs: Sequence[PolicySpec],
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
) -> list[dict[str, Any]]:
    """Ask every question densely and under every policy.

    Args:
        model: On Stem's attention function.
        vocabulary: Its own, from :func:`read_vocabulary`.
        specs: The policies.
        tasks: Among :data:`stress.tasks.TASKS`.
        lengths: Tokens of prompt and answer together.
        samples: Prompts of each task and length.

    Returns:
        A record of each prompt and policy; ``found`` when every token of the answer is right.
    """
    records = []
    for length in lengths:
        contenders = {"dense": None} | {spec.text: spec.at(length) for spec in specs}
        for sample in range(samples):
            for task in tasks:
                prompt = make_prompt(task, length, sample, vocabulary)
                wanted = prompt.answer
                for name, policy in contenders.items():
                    reading = read(
                        model, prompt.ids, policy, positions=1, max_new_tokens=ANSWER,
                        is_done=lambda tokens, wanted=wanted: tokens[-1] != wanted[len(tokens) - 1],
                    )  # fmt: skip
                    about = {"task": task, "tokens": length, "contender": name, "sample": sample, "density": reading.density}
                    records.append({**about, "wanted": wanted, "answer": reading.tokens, "found": reading.tokens == wanted})
    return records


def save_vocabulary(directory: Path, vocabulary: Vocabulary, facts: Mapping[str, Any]) -> None:
    """Write which ids mean what, and a tokenizer that spells them, beside a model.

    Args:
        directory: The model's.
        vocabulary: The model's.
        facts: How the model was made; plain JSON types.
    """
    layout = {"format": 1, "vocabulary": asdict(vocabulary), "tasks": {name: asdict(task) for name, task in TASKS.items()}}
    (directory / LAYOUT).write_text(json.dumps({**layout, **facts}, indent=1) + "\n", encoding="utf-8")
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_spellings(vocabulary))}, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast  # which has no types
    make(tokenizer_object=inner, unk_token="<0>").save_pretrained(directory)


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a model made by train.py.

    Raises:
        ValueError: The directory holds no such model, or one whose prompts were made differently.
    """
    file = directory / LAYOUT
    if not file.is_file():
        fix = "train one with python -m stress.train"
        raise bad_argument("model", f"a directory with {LAYOUT}, as the tasks need their own model", repr(str(directory)), fix)
    layout = json.loads(file.read_text(encoding="utf-8"))
    if layout["format"] != 1:
        raise bad_argument("model", f"{LAYOUT} of format 1", layout["format"], "use the version that trained it")
    return Vocabulary(**layout["vocabulary"])


def _spellings(vocabulary: Vocabulary) -> list[str]:
    markers = {int(marker): marker.name for marker in Marker}
    words = [markers.get(index, f"<{index}>") for index in range(vocabulary.MARKERS)]
    for kind, count in asdict(vocabulary).items():
        words += [f"{kind.removesuffix('s')}{index}" for index in range(count)]
    return words


def main(arguments: list[str] | None = None) -> int:
    """Evaluate and print the shares of right answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory that train.py made")
    parser.add_argument("--policy", action="append", help="repeatable; mass and paper unless given")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--lengths", default="8192")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--records", type=Path, help="file for one line of JSON a prompt and policy")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, _ = load_model(find_model(str(options.model)), device, dtype)
    take_stem(model)
    specs = [parse_spec(text) for text in options.policy or ("mass", "paper")]
    lengths = [int(length) for length in options.lengths.split(",")]
    records = evaluate(model, read_vocabulary(options.model), specs, options.tasks.split(","), lengths, options.samples)
    if options.records is not None:
        options.records.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    cells = pd.DataFrame(records).groupby(["tokens", "task", "contender"], sort=False)
    print(cells.agg(density=("density", "mean"), right=("found", "sum"), of=("found", "size")).to_string())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
