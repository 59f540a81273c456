"""``stem-evals bench``: Stem against its peers on random inputs, one suite at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import Progress

from stem_attention.cli import options
from stem_attention.cli.errors import UserError
from stem_attention.cli.system import output, print_json, progress_console
from stem_attention.errors import nearest
from stem_attention.models.shapes import Heads
from stem_attention.policies import PolicySpec

if TYPE_CHECKING:
    from stem_evals.bench.setup import Setup

_BY_SUITE: Any = None  # default of --lengths
_ATTENTION: Any = "attention"
_TIMED = "What is timed"
_DEFAULT_HEADS = Heads(8, 2, 64)


class Suite(options.Choice):
    """Describe what is compared."""

    attention = "attention"
    kernel = "kernel"
    selection = "selection"
    serving = "serving"
    ttft = "ttft"


def bench(
    suite: Annotated[
        Suite,
        options.option(
            "attention: the whole call; kernel: attention over given lists; selection: choosing the blocks; "
            "serving: chunks of many prompts from a paged cache; ttft: whole models until the first token.",
            "NAME",
            parser=options.one_of(Suite),
        ),
    ] = _ATTENTION,
    policy: options.PolicyOption = options.MASS,
    lengths: options.Lengths = _BY_SUITE,
    model: Annotated[
        str | None,
        options.option(
            "Take the heads of llama-3.1-8b, qwen3-8b, qwen2.5-7b, llama-3.2-1b, gemma; ttft: the first four or tiny.",
            "NAME",
            "8 query heads, 2 key/value heads, head_dim 64; for ttft llama-3.2-1b, on a CPU tiny",
        ),
    ] = None,
    heads: options.HeadCount = None,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = None,
    dense_below: options.DenseBelow = None,
    device: options.Device = options.AUTO,
    dtype: options.Dtype = options.AUTO,
    repeats: Annotated[
        int | None,
        options.option(
            "Timed runs of each, in turn; medians are printed.",
            shown="5 on the CPU, 20 elsewhere; for ttft 5, 3 from 32768 tokens, 2 from 65536",
            min=1,
            rich_help_panel=_TIMED,
        ),
    ] = None,
    threads: Annotated[
        int | None, options.option("CPU threads.", shown="torch's choice", min=1, rich_help_panel=options.RUNS)
    ] = None,
    seed: options.Seed = 0,
    dense: Annotated[
        bool,
        typer.Option("--dense/--no-dense", help="Time dense attention too, up to 262144 tokens.", rich_help_panel=_TIMED),
    ] = True,
    first_call: Annotated[
        bool,
        typer.Option(
            "--first-call",
            help="ttft: also time new processes' first prefill, Triton cache empty and filled.",
            rich_help_panel=_TIMED,
        ),
    ] = False,
    as_json: options.Json = False,
) -> int:
    """Time Stem against its peers on random inputs, after checking its result.

    Peers are dense attention (SDPA; on a GPU cuDNN's, Flash and FlashAttention-4), for the kernel FlexAttention over the same
    lists, for the selection the same policy in eager torch. Lengths are 8192,32768 unless given, for ttft on a CPU 2048,8192;
    a policy with a density is tuned anew at each.
    """
    from stem_evals.bench.checks import WrongResultError
    from stem_evals.bench.setup import Setup
    from stem_evals.bench.tables import show

    if lengths is None:
        lengths = options.TokenCounts((2048, 8192) if suite is Suite.ttft and device.type == "cpu" else (8192, 32768))
    try:
        for length in lengths:
            policy.at(length)
        run, size = _suite(suite, model, (heads, kv_heads, head_dim), device, policy, first_call)
    except ValueError as error:
        raise UserError(f"--policy: {str(error).removeprefix('policy: ')}") from error
    if threads is not None:
        torch.set_num_threads(threads)
    with Progress(console=progress_console()) as progress:

        def start(name: str, steps: int) -> Callable[[], None]:
            return partial(progress.advance, progress.add_task(name, total=steps))

        asked = sorted(set(lengths))
        setup = Setup(policy, asked, size, options.torch_dtype(dtype, device), device, dense_below, repeats, seed, dense, start)
        try:
            report = run(setup)
        except WrongResultError as error:
            raise UserError(f"bench: {error}; no time is worth printing") from error
    if as_json:
        print_json(report)
    else:
        show(report, output())
    return 0


def _suite(
    suite: Suite, model: str | None, given: tuple[int | None, ...], device: torch.device, policy: PolicySpec, first_call: bool
) -> tuple[Callable[[Setup], dict[str, Any]], Heads]:
    """Return what runs a suite, and the heads that it runs with; ValueError where the policy is for others."""
    if suite is not Suite.ttft:
        from stem_evals.bench.layer import run_layers
        from stem_evals.bench.serving import run_serving

        size = options.read_heads(_DEFAULT_HEADS, model, *given)
        policy.policy.check_heads(size.heads)
        return run_serving if suite is Suite.serving else partial(run_layers, suite.value), size
    from stem_evals.bench.ttft import run_ttft
    from stem_evals.bench.ttft_models import ARCHITECTURES

    name = model or ("tiny" if device.type == "cpu" else "llama-3.2-1b")
    if name not in ARCHITECTURES:
        fix = nearest(name, ARCHITECTURES, "pick one of these names")
        raise UserError(f"--model: expected one of {', '.join(ARCHITECTURES)}, got {name!r}; {fix}")
    if any(given):
        raise UserError("--heads, --kv-heads, --head-dim: suite ttft runs whole models; give --model alone")
    policy.policy.check_model(ARCHITECTURES[name].layers, ARCHITECTURES[name].heads.heads)
    return partial(run_ttft, name=name, first_call=first_call), ARCHITECTURES[name].heads
