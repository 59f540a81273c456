"""Train the long-context stress model: a small Llama-shaped model that solves the tasks of tasks.py.

cd benchmarks && python -m stress.train --minutes 8 --out DIR --checkpoint FILE

The minutes are wall clock and hold everything, the closing accuracy table included. Rows grow from 256 tokens to 32 Ki, a
step up whenever nearly every answer is right or the stage's share of the time is over. The model and a checkpoint are
written every minute; --resume goes on from the checkpoint, or from the weights alone when given the model's directory.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from stress.evaluate import LAYOUT, save_vocabulary
from stress.model import SIZES, Questions, Size, answer_logits, build, draw_recipe, draw_repeats, join, stretched
from stress.tasks import ANSWER, TASKS, make_batch, make_prompt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

START = time.monotonic()
LEARNED = 0.9
"""Share of right answers, in the worst of the tasks, at which rows grow."""

FIRST_STAGE = 0.3
"""Share of the training time that the shortest rows may take, on which looking up is learned; the others share the rest."""

CLOSING = 0.12
"""Share of the minutes that the closing table may take."""

FIRST_SHOWN = 1_000_000
"""First seed of the closing table; evaluate.py counts from 0."""


@dataclass
class Progress:
    """How far training has come, besides the tensors."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    stage_steps: int = 0
    skipped: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    """Moving average of the share of answers right in training, by ``length/task/links``."""
    history: list[str] = field(default_factory=list)

    def at(self, length: int) -> dict[str, float]:
        """The accuracies at one length."""
        return {name.split("/", 1)[1]: share for name, share in self.accuracy.items() if name.startswith(f"{length}/")}

    def advance(self, fraction: float, lengths: list[int]) -> None:
        """Go on to the next length if this one is learned or its share of the time is over."""
        learned = self.stage_steps >= 50 and min(self.at(lengths[self.stage]).values()) >= LEARNED
        last = len(lengths) - 1
        if self.stage < last and (learned or fraction >= FIRST_STAGE + (1 - FIRST_STAGE) * self.stage / last):
            self.stage, self.stage_steps = self.stage + 1, 0


class Trainer:
    """A model, its optimizers and its progress. Masters are the weights in fp32, from which the model's are rounded."""

    def __init__(
        self, size: Size, model: LlamaForCausalLM, device: torch.device, dtype: torch.dtype, rate: float, seed: int
    ) -> None:
        self.size, self.rate, self.progress = size, rate, Progress()
        self.model = model.to(device)
        self.model.set_attn_implementation("sdpa")
        for weight in self.model.parameters():
            weight.data = weight.data.to(dtype)  # of the weights alone: rotary frequencies in bf16 would be others
        self.masters = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}
        matrices = [master for name, master in self.masters.items() if ".layers." in name and master.ndim == 2]
        others = [master for name, master in self.masters.items() if not (".layers." in name and master.ndim == 2)]
        # Muon takes fewer steps than AdamW; embeddings and norms are not for it.
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.chance, self.generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
        cuda = device.type == "cuda"
        self.attention: Callable[[], AbstractContextManager[Any]] = (
            (lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)) if cuda else nullcontext
        )

    def draw(self, length: int, tokens: int, with_repeats: bool) -> Questions:
        """A batch of about ``tokens`` tokens, at least a row of every task."""
        rows, vocabulary = max(1, tokens // ((len(TASKS) + with_repeats) * length)), self.size.vocabulary
        recipes = {task: draw_recipe(task, length, self.chance) for task in TASKS}
        batches = {task: make_batch(recipe, vocabulary, rows, self.generator) for task, recipe in recipes.items()}
        if with_repeats:
            batches["repeats"] = draw_repeats(vocabulary, rows, length, self.generator)
        return join(batches)

    def step(self, length: int, tokens: int, scale: float) -> float:
        """One step; returns the loss. A step whose gradient is not finite changes nothing and is counted."""
        progress = self.progress
        asked = self.draw(length, tokens, with_repeats=progress.stage < 2)
        positions = stretched(len(asked.ids), length, self.generator) if progress.stage else None
        with self.attention():
            logits, answers = answer_logits(self.model, asked.ids, asked.starts, positions)
            losses = cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view(-1, ANSWER).mean(1)
            loss = (losses * asked.weights).sum()
            loss.backward()
        for name, weight in self.model.named_parameters():
            assert weight.grad is not None
            self.masters[name].grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), 1.0)
        right = torch.stack([(logits.argmax(-1) == answers).all(1).float(), torch.ones_like(losses)], 1)
        counts = torch.zeros(len(asked.names), 2, device=loss.device).index_add_(0, asked.groups, right)
        value, size, *flat = torch.cat([torch.stack([loss.detach(), norm]), counts.flatten()]).tolist()
        if math.isfinite(value) and math.isfinite(size):
            self.update(self.rate * scale)
        else:
            progress.skipped += 1
        for name, hits, count in zip(asked.names, flat[::2], flat[1::2], strict=True):
            if count:
                progress.accuracy[name] = 0.9 * progress.accuracy.get(name, hits / count) + 0.1 * hits / count
        progress.steps, progress.stage_steps = progress.steps + 1, progress.stage_steps + 1
        progress.tokens += asked.ids.numel()
        return value

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Move the masters along their gradients, and round the model's weights from them."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        torch._foreach_copy_(list(self.model.parameters()), list(self.masters.values()))

    def save(self, checkpoint: Path | None, out: Path, facts: dict[str, Any]) -> None:
        """Write the model in bf16, and the checkpoint with what else is needed to go on."""
        weights = {name: weight.to(torch.bfloat16) for name, weight in self.model.state_dict().items()}
        self.model.save_pretrained(out, state_dict=weights)
        save_vocabulary(out, self.size.vocabulary, {**facts, "progress": asdict(self.progress)})
        if checkpoint is not None:
            states = [optimizer.state_dict() for optimizer in self.optimizers]
            part = checkpoint.with_suffix(".part")
            torch.save({"masters": self.masters, "optimizers": states, "progress": asdict(self.progress)}, part)
            part.replace(checkpoint)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(checkpoint, map_location=next(iter(self.masters.values())).device, weights_only=True)
        for name, master in self.masters.items():
            master.copy_(saved["masters"][name])
        torch._foreach_copy_(list(self.model.parameters()), list(self.masters.values()))
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**saved["progress"])

    def go_on(self, stage: int | None, lengths: list[int], seed: int) -> None:
        """Begin at a stage, the reached one unless given, with rows that were not seen before."""
        progress = self.progress
        progress.stage, progress.stage_steps = min(progress.stage if stage is None else stage, len(lengths) - 1), 0
        self.chance.seed(seed + progress.steps)
        self.generator.manual_seed(seed + progress.steps)


@torch.no_grad()
def accuracy(trainer: Trainer, task: str, length: int, samples: int) -> float:
    """Share of evaluation prompts whose answer is right when read densely."""
    device, right = trainer.generator.device, 0
    for seed in range(FIRST_SHOWN, FIRST_SHOWN + samples):
        prompt = make_prompt(task, length, seed, trainer.size.vocabulary)
        ids = torch.tensor([prompt.ids + prompt.answer], device=device)
        with trainer.attention():
            logits, answer = answer_logits(trainer.model, ids, torch.tensor([len(prompt.ids)], device=device))
        right += bool((logits.argmax(-1) == answer).all())
    return right / samples


def closing_table(trainer: Trainer, lengths: list[int], most: int, deadline: float) -> dict[str, dict[str, float]]:
    """Dense accuracy by length and task, shorter lengths first, as far as the time goes."""
    table: dict[str, dict[str, float]] = {}
    trainer.model.eval()
    print("| tokens | prompts | " + " | ".join(TASKS) + " |\n|" + "--:|" * (2 + len(TASKS)))
    for length in lengths:
        samples = min(most, max(8, 2**20 // length))
        row = {task: accuracy(trainer, task, length, samples) for task in TASKS if time.monotonic() < deadline}
        if row:
            table[str(length)] = row
            cells = [f"{row[task]:.0%}" if task in row else "no time" for task in TASKS]
            print(f"| {length} | {samples} | " + " | ".join(cells) + " |", flush=True)
    return table


def train(trainer: Trainer, options: argparse.Namespace, lengths: list[int], deadline: float, save: Callable[[], None]) -> None:
    """Train until the deadline, a number of steps, or a run of steps that are not finite."""
    progress, begun, already = trainer.progress, time.monotonic(), trainer.progress.seconds
    logged = saved = begun
    first = progress.steps
    while (now := time.monotonic()) < deadline and progress.steps - first < options.steps:
        fraction = (now - begun) / (deadline - begun)
        scale = min(1.0, (progress.steps - first + 1) / 100, max(0.05, 2 * (1 - fraction)))
        # Now and then a shorter row, so that these are not forgotten.
        shorter = progress.stage and trainer.chance.random() < 0.2
        length = lengths[trainer.chance.randrange(progress.stage)] if shorter else lengths[progress.stage]
        loss = trainer.step(length, options.tokens, scale)
        progress.seconds = already + time.monotonic() - begun
        if progress.skipped > 50:
            raise RuntimeError("more than 50 steps were not finite; go on from the checkpoint with a lower --rate")
        if time.monotonic() - logged > options.log_every:
            logged = time.monotonic()
            right = " ".join(f"{name} {share:.2f}" for name, share in progress.at(lengths[progress.stage]).items())
            progress.history.append(
                f"{progress.seconds:.0f} s, step {progress.steps}, {progress.tokens / 1e6:.1f} M tokens, rows of "
                f"{lengths[progress.stage]}, rate x{scale:.2f}, loss {loss:.3f}: {right}"
            )
            print(progress.history[-1], flush=True)
        if time.monotonic() - saved > 60:
            save()
            saved = time.monotonic()
        progress.advance(fraction, lengths)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--checkpoint", type=Path, help="file to keep all that is needed to go on")
    parser.add_argument("--resume", type=Path, help="a checkpoint, or a model's directory")
    parser.add_argument("--stage", type=int, help="index of the length to begin with; the reached one unless given")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall clock, everything included")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--tokens", type=int, default=65536, help="of a batch; at least a row of every task")
    parser.add_argument("--lengths", default="256,1024,4096,16384,32768", help="of rows, in turn")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=40, help="prompts in each cell of the closing table, at most")
    parser.add_argument("--log-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--commit", help="to put on record")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, begun: float | None = None) -> int:
    """Train, save, and print the closing table; the minutes count from ``begun``."""
    options = read_options(arguments)
    lengths = [int(length) for length in options.lengths.split(",")]
    end = (time.monotonic() if begun is None else begun) + 60 * options.minutes
    torch.manual_seed(options.seed)
    disable_progress_bar()
    weights_only = options.resume is not None and options.resume.is_dir()
    size = SIZES[options.size]
    model = LlamaForCausalLM.from_pretrained(options.resume) if weights_only else build(size)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    trainer = Trainer(size, model, torch.device(options.device), dtype, options.rate, options.seed)
    if weights_only:
        layout = json.loads((options.resume / LAYOUT).read_text(encoding="utf-8"))
        trainer.progress = Progress(**layout["progress"])
    elif options.resume is not None:
        trainer.load(options.resume)
    trainer.go_on(options.stage, lengths, options.seed)
    facts: dict[str, Any] = {
        "commit": options.commit, "torch": torch.__version__, "seed": options.seed, "lengths": lengths,
    }  # fmt: skip

    def save() -> None:
        trainer.save(options.checkpoint, options.out, facts)

    print(
        f"{sum(master.numel() for master in trainer.masters.values()) / 1e6:.1f} M parameters on {options.device}", flush=True
    )
    try:
        train(trainer, options, lengths, end - CLOSING * 60 * options.minutes, save)
    finally:
        save()
    facts["dense"] = closing_table(trainer, [*lengths, 2 * lengths[-1], 4 * lengths[-1]], options.samples, end)
    save()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(begun=START))
