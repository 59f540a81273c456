"""Perplexity and needle retrieval of a real model, dense and under sparse policies.

python benchmarks/accuracy.py --json benchmarks/results/accuracy-smollm2-cpu.json

Prints Markdown tables. Every measurement is appended to --lines, one JSON object a line, as soon as it is there, so that an
interrupted run loses nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention import StemConfig, __version__
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.evaluation.models import ModelSource, context_length, find_model, load_model, take_stem
from stem_attention.evaluation.needle import ANSWER_TOKENS, NeedleCase, needle_cases, try_needle, wilson_interval
from stem_attention.evaluation.perplexity import (
    STDLIB_MODULES,
    TextReading,
    read_text,
    score_text,
    stdlib_text,
    text_ids,
)
from stem_attention.evaluation.prefill import Watcher
from stem_attention.policies import Policy, make_policy, policy_names

LONGEST_DEFAULT_CONTEXT = 8192
DENSE = "dense"
PRESETS: dict[str, Callable[..., StemConfig]] = {
    "stem": StemConfig,
    "paper": StemConfig.paper,
    "angelslim": StemConfig.angelslim,
}
NAMES = tuple(dict.fromkeys([DENSE, *PRESETS, *policy_names()]))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Contender = StemConfig | Policy | None
Contenders = dict[str, Contender]
Record = dict[str, Any]
Watching = Callable[[str], Any]


def make_contender(name: str, tokens: int) -> Contender:
    """What to prefill with: None for dense, a preset's config (sparse at any length), or a policy.

    Uniform top-k and sink + window get the budget whose density at ``tokens`` is nearest to that of Stem's default.
    """
    if name == DENSE:
        return None
    if name in PRESETS:
        return PRESETS[name](dense_below=0)
    config = StemConfig()
    blocks = -(-tokens // config.block_size)
    if name == "uniform":
        shares = (kept / blocks for kept in range(1, blocks + 1))
        return nearest_to_stem([make_policy(name, config, scaling=share / config.ratio_short) for share in shares], tokens)
    if name == "sink-window":
        return nearest_to_stem([make_policy(name, config, window_blocks=kept) for kept in range(1, blocks + 1)], tokens)
    return make_policy(name, config)


def nearest_to_stem(candidates: list[Policy], tokens: int) -> Policy:
    """The candidate whose density is nearest to Stem's. How many blocks these keep does not depend on what q, k and v hold."""
    zeros = torch.zeros(1, tokens, 1, 1)
    target = make_policy("stem", StemConfig())(zeros, zeros, zeros).density()
    return min(candidates, key=lambda policy: abs(policy(zeros, zeros, zeros).density() - target))


def describe(contender: Contender) -> Record:
    """A contender's settings as plain types."""
    if contender is None:
        return {"policy": DENSE}
    if isinstance(contender, StemConfig):
        return {"policy": "stem", **contender.to_dict()}
    fields = {name: value.to_dict() if isinstance(value, StemConfig) else value for name, value in vars(contender).items()}
    return {"policy": contender.name, **fields}


def measure_perplexity(model: PreTrainedModel, ids: list[int], contenders: Contenders, watching: Watching) -> Iterator[Record]:
    """Score the text under every contender; dense comes first, as what the others are compared with."""
    dense: TextReading | None = None
    for name in dict.fromkeys([DENSE, *contenders]):
        with watching(f"perplexity, {name}") as watcher:
            reading = read_text(model, ids, contenders.get(name), on_attention=watcher)
        dense = dense or reading
        record = {"density": reading.reading.density, "seconds": reading.reading.seconds}
        yield {"measure": "perplexity", "name": name, **asdict(score_text(model, ids, dense, reading)), **record}


def measure_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: list[NeedleCase],
    contenders: Contenders,
    watching: Watching,
) -> Iterator[Record]:
    """Try every case under every contender, case by case, so that a run cut short compares like with like."""
    for place, case in enumerate(cases, 1):
        for name, contender in contenders.items():
            with watching(f"needle {place} of {len(cases)}, {name}") as watcher:
                trial = try_needle(model, tokenizer, case, contender, on_attention=watcher)
            yield {"measure": "needle", "name": name, **asdict(trial)}


def summarise_needles(trials: list[Record]) -> list[Record]:
    """Hits, their share's 95 % interval and the mean density of every contender."""
    summary = []
    for name in dict.fromkeys(trial["name"] for trial in trials):
        mine = [trial for trial in trials if trial["name"] == name]
        hits, count = sum(trial["found"] for trial in mine), len(mine)
        density = sum(trial["density"] for trial in mine) / count
        summary.append(
            {"name": name, "hits": hits, "trials": count, "wilson_95": wilson_interval(hits, count), "density": density}
        )
    return summary


def markdown(perplexity: list[Record], needles: list[Record]) -> str:
    """Both results as tables for a README."""
    lines = []
    if perplexity:
        lines += ["| policy | kept | perplexity | last half | KL from dense | same top token |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row['name']} | {row['density']:.3f} | {row['perplexity']:.3f} | {row['perplexity_last_half']:.3f} "
            f"| {row['kl']:.4f} | {row['top1']:.1%} |"
            for row in perplexity
        ]
    if needles:
        lines += [""] * bool(lines) + ["| policy | kept | needles found | 95 % interval |", "|---|---|---|---|"]
        lines += [
            f"| {row['name']} | {row['density']:.3f} | {row['hits']} of {row['trials']} "
            f"| {row['wilson_95'][0]:.0%} to {row['wilson_95'][1]:.0%} |"
            for row in needles
        ]
    return "\n".join(lines)


def facts(options: argparse.Namespace, source: ModelSource, model: PreTrainedModel, arguments: list[str]) -> Record:
    """What is needed to repeat the run. Read before it, since the working tree may move on meanwhile."""
    return {
        "command": shlex.join(["python", "benchmarks/accuracy.py", *arguments]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": git("diff", "--name-only", "HEAD", "--", "src", "benchmarks/accuracy.py").splitlines(),
        "versions": {
            "stem-attention": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(model.device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "model": {"name": Path(str(source)).name, "sha256": weights_hash(source)},
    }


def git(*arguments: str) -> str:
    """Output of a git command in this script's repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def weights_hash(source: ModelSource) -> str | None:
    """SHA-256 of the weight files, in the order of their names; None for a model named by its hub id."""
    files = [Path(str(source))] if source.gguf else sorted(Path(source.location).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


@contextmanager
def progress_on(console: Console, layers: int, total: int) -> Iterator[Watching]:
    """Two bars: prefills, and layers of the present one. Gives what opens a prefill and watches its layers."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runs = progress.add_task("prefills", total=total)
        bar = progress.add_task("", total=layers)

        @contextmanager
        def watching(name: str) -> Iterator[Watcher]:
            progress.reset(bar, description=name)
            yield lambda call: progress.advance(bar)
            progress.advance(runs)

        yield watching


def commas(text: str) -> list[str]:
    """The parts of a list as options give it; empty for an empty text."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory, GGUF file or hub id; the embedded SmolLM2-135M-Instruct unless given")
    parser.add_argument("--tokens", type=int, help="length of texts and prompts; the model's context, at most 8192")
    parser.add_argument("--text", type=Path, help="UTF-8 file to predict; sources of Python's standard library unless given")
    known = ", ".join(NAMES)
    parser.add_argument("--policies", type=commas, default="dense,stem,paper,uniform,sink-window", help=f"of {known}")
    parser.add_argument("--needle-policies", type=commas, default="dense,stem,paper", help="the same for the needles")
    parser.add_argument("--depths", type=commas, default="0.1,0.5,0.9", help="where needles stand, 0 to 1")
    parser.add_argument("--per-depth", type=int, default=2, help="needles at each depth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="file for the whole result")
    parser.add_argument("--lines", type=Path, help="file to which each measurement is appended at once")
    options = parser.parse_args(arguments)
    unknown = sorted({*options.policies, *options.needle_policies} - {*NAMES})
    if unknown:
        parser.error(f"unknown policies {', '.join(unknown)}; pick among {known}")
    return options


def run(options: argparse.Namespace, arguments: list[str], console: Console) -> Record:
    """Measure everything and return the result.

    Raises:
        ValueError: An option does not fit the model or the text.
        UnsupportedError: The model does not take Stem, or its text cannot be scored.
    """
    source = find_model(options.model)
    with console.status(f"loading {source}"):
        model, tokenizer = load_model(source, torch.device(options.device), DTYPES[options.dtype])
    take_stem(model)
    limit = context_length(model) or LONGEST_DEFAULT_CONTEXT
    tokens = min(limit, LONGEST_DEFAULT_CONTEXT) if options.tokens is None else options.tokens
    if tokens > limit:
        raise bad_argument("tokens", f"at most {limit}, the model's context", tokens, "lower --tokens")
    text = stdlib_text() if options.text is None else options.text.read_text(encoding="utf-8")
    ids = text_ids(tokenizer, text, tokens) if options.policies else []
    depths = [float(depth) for depth in options.depths] if options.needle_policies else []
    cases = needle_cases(tokenizer, tokens - ANSWER_TOKENS, depths, options.per_depth)
    made = {name: make_contender(name, tokens) for name in dict.fromkeys([*options.policies, *options.needle_policies])}
    scored, tried = ({name: made[name] for name in names} for names in (options.policies, options.needle_policies))
    described = "standard library: " + ", ".join(STDLIB_MODULES) if options.text is None else options.text.name
    result = {
        **facts(options, source, model, arguments),
        "text": {"description": described, "sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(ids)},
        "policies": {name: describe(contender) for name, contender in made.items()},
    }
    records: list[Record] = []
    total = len({DENSE, *scored} if scored else ()) + len(cases) * len(tried)
    with progress_on(console, model.config.get_text_config().num_hidden_layers, total) as watching:
        texts = measure_perplexity(model, ids, scored, watching) if scored else iter(())
        for record in chain(texts, measure_needles(model, tokenizer, cases, tried, watching)):
            records.append(record)
            if options.lines is not None:
                with options.lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    trials = [record for record in records if record["measure"] == "needle"]
    return {
        **result,
        "perplexity": [record for record in records if record["measure"] == "perplexity"],
        "needle": {"summary": summarise_needles(trials), "trials": trials},
    }


def main(arguments: list[str]) -> int:
    """Run the script; returns the exit code."""
    options = parse(arguments)
    try:
        result = run(options, arguments, Console(stderr=True))
    except (ValueError, OSError, UnsupportedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result["perplexity"], result["needle"]["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
