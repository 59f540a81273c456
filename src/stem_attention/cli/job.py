"""Steps that all commands with a model share: open the model, make the prompt, show progress."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stem_attention.cli.errors import UserError, blaming, need
from stem_attention.cli.options import DtypeName, piped_text, torch_dtype
from stem_attention.errors import UnsupportedError
from stem_attention.models.load import Model, ModelSource, Tokenizer, context_length, find_model, load_model, reason, take_stem
from stem_attention.models.prefill import AttentionCall, Reading, Watcher, read
from stem_attention.models.prompts import Prompt, chat_ids, planted_prompt
from stem_attention.policies import Policy, PolicySpec

LONGEST_DEFAULT = 32768  # tokens of a made-up prompt, where a model's context holds more
_FALLBACK_CONTEXT = 8192
_MARGIN = 64  # tokens of the model's context that the made-up prompt leaves free beside the answer


def open_model(
    name: str | None, device: torch.device, dtype: torch.dtype, console: Console
) -> tuple[ModelSource, Model, Tokenizer]:
    """Find and load a model, try whether it reads, and put it on Stem's attention function."""
    need("transformers", purpose="a model")
    with blaming("--"):
        source = find_model(name)
        if source.gguf is not None:
            need("gguf", "accelerate", purpose="a GGUF file")
        fetched = "" if Path(source.location).is_dir() else ": from the cache, or fetched from the hub, which can take minutes"
        with console.status(escape(f"loading {source}{fetched}")):  # rich takes what is in brackets for a style
            model, tokenizer = load_model(source, device, dtype)
            _try(model, tokenizer)
    with blaming(f"--model: {source} holds bad stem_attention settings: "):
        take_stem(model)
    return source, model, tokenizer


def _try(model: Model, tokenizer: Tokenizer) -> None:
    """Read a few words dense: what is wrong with a model's files, its config above all, often shows only there."""
    calls: list[AttentionCall] = []
    try:
        read(model, list(tokenizer("Read this.").input_ids), None, positions=1, on_attention=calls.append)
    except (UnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's code, fed with numbers that it does not check
        raise UserError(f"--model: it is loaded, but cannot read ({reason(error)}); check its config.json") from error
    if not calls:
        raise UnsupportedError(
            f"{type(model).__name__} never calls an attention function of transformers: it has no attention, or keeps its "
            "own; use another model class"
        )


@dataclass(frozen=True)
class Job:
    """A model and a prompt, ready to be read, and the policy that was asked for as ``spec``, tuned to it."""

    source: ModelSource
    model: Model
    tokenizer: Tokenizer
    prompt: Prompt
    policy: Policy
    spec: str

    @property
    def layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    def describe(self) -> dict[str, Any]:
        """Collect the facts about the job that belong in every report."""
        return {
            "model": str(self.source),
            "prompt_tokens": len(self.prompt.ids),
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "spec": self.spec,
            "policy": self.policy.to_dict(),
        }

    def check_places(self, layers: list[int], heads: list[int]) -> None:
        """Check indices of layers and heads against the model."""
        q_heads = self.model.config.get_text_config().num_attention_heads
        for name, given, limit in (("layer", layers, self.layers), ("head", heads, q_heads)):
            for index in given:
                if not 0 <= index < limit:
                    raise UserError(f"--{name}: expected 0 to {limit - 1} for this model, got {index}; pick one of those")


def prepare(
    name: str | None, device: torch.device, dtype: DtypeName, spec: PolicySpec, console: Console, *, text: str | None,
    context: int | None, seed: int, depth: float, use_template: bool, answer: int = 0,
) -> Job:  # fmt: skip
    """Load the model, make the prompt (``text``, what is piped in, or made up), and tune the policy to its length."""
    text = piped_text() if text is None else text
    source, model, tokenizer = open_model(name, device, torch_dtype(dtype, device), console)
    limit = context_length(model)
    room = (_FALLBACK_CONTEXT if limit is None else limit) - answer

    def check(tokens: int, fix: str) -> None:
        if limit is not None and tokens > room:
            beside, also = (f" with {answer} more for the answer", " or --max-new-tokens") if answer else ("", "")
            said = f"prompt of {tokens} tokens{beside} is longer than the model's context of {limit} tokens"
            raise UserError(f"{said}; lower {fix}{also}")

    named = "--context" if context is not None or not answer else "tokens that --max-new-tokens leaves to the prompt"
    with blaming("", tokens=named):
        if text is None:
            length = min(room - _MARGIN, LONGEST_DEFAULT) if context is None else context
            check(length, "--context")
            prompt = planted_prompt(tokenizer, length, seed=seed, depth=depth, use_template=use_template)
        else:
            prompt = Prompt(chat_ids(tokenizer, text, use_template=use_template))
    if not prompt.ids:
        raise UserError("--prompt-file: the tokenizer makes no tokens of this text; write some words into it")
    check(len(prompt.ids), "the length of the prompt")
    config = model.config.get_text_config()
    with blaming("--policy: "):
        policy = spec.at(len(prompt.ids))
        policy.check_model(config.num_hidden_layers, config.num_attention_heads)
    return Job(source, model, tokenizer, prompt, policy, spec.text)


def read_with_progress(
    job: Job, console: Console, policy: Policy | None, watcher: Watcher, *, dense_below: int | None = 0, answer: int = 0
) -> Reading:
    """Prefill, and answer with up to ``answer`` tokens, with progress bars on ``console``; the rest is as for ``read``."""
    name = "dense" if policy is None else policy.name
    with _progress(console, TextColumn("{task.fields[unit]}")) as progress:
        layers = progress.add_task(f"{name}: prefill", total=job.layers, unit="layers")
        tokens = progress.add_task(f"{name}: answer", total=answer, unit="tokens", visible=answer > 0)

        def on_attention(call: AttentionCall) -> None:
            watcher(call)
            progress.advance(layers)

        reading = read(
            job.model, job.prompt.ids, policy, dense_below=dense_below, max_new_tokens=answer,
            on_attention=on_attention, on_token=lambda: progress.advance(tokens),
        )  # fmt: skip
        progress.update(tokens, total=len(reading.tokens))  # an answer may end before the limit
    return reading


@contextmanager
def ticking(console: Console, what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Show a bar that vanishes at the end; yields what moves it on by one."""
    with _progress(console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _progress(console: Console, *more: TextColumn, transient: bool = False) -> Progress:
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), *more, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=transient, disable=transient and not console.is_terminal)
