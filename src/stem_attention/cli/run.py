"""``stem-attention run``: one prompt, read dense and sparse."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from stem_attention.cli import options
from stem_attention.cli.inspect import save_picture
from stem_attention.cli.job import Job, prepare, read_with_progress
from stem_attention.cli.system import output, print_json, progress_console
from stem_attention.models.prefill import Reading, agreement, read
from stem_attention.models.views import HeadRecorder

MISSED = 3  # exit code when the sparse answer lacks the planted fact
_LONGEST_LABEL = 24  # characters of a table's head; a longer spec gives way to its policy's name
_WARM_UP_TOKENS = 256


def run(
    model: options.Model = None, policy: options.PolicyOption = options.MASS, prompt_file: options.PromptFile = None,
    context: options.Context = None,
    max_new_tokens: Annotated[int, options.option("Tokens of the longest answer.", min=1)] = 32,
    dense_below: options.DenseBelow = None, device: options.Device = options.AUTO,
    dtype: options.Dtype = options.AUTO, seed: options.Seed = 0, depth: options.Depth = 0.5,
    no_chat_template: options.NoChatTemplate = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Density and time of every layer.")] = False,
    plot: options.Plot = None,
    layer: Annotated[
        int | None, options.option("Layer of the picture.", shown="the middle one", rich_help_panel=options.PICTURE)
    ] = None,
    head: Annotated[int, options.option("Query head of the picture.", rich_help_panel=options.PICTURE)] = 0,
    as_json: options.Json = False,
) -> int:  # fmt: skip
    """Read a long prompt with a real model, dense and sparse: answers, times and agreement.

    Exit code 3 means that the run went well but the sparse answer lacks the number planted in the made-up prompt.
    """
    progress = progress_console()
    job = prepare(
        model, device, dtype, policy, progress, text=prompt_file, context=context, seed=seed, depth=depth,
        use_template=not no_chat_template, answer=max_new_tokens,
    )  # fmt: skip
    shown = job.layers // 2 if layer is None else layer
    job.check_places([shown], [head])
    recorder = HeadRecorder([shown] if plot else [], [head])
    with progress.status("warming up"):  # so that first calls pay for thread pools on the CPU, for compiled kernels elsewhere
        on_cpu = job.model.device.type == "cpu"
        ids = job.prompt.ids[:_WARM_UP_TOKENS] if on_cpu else job.prompt.ids
        read(job.model, ids, None)
        read(job.model, ids, job.policy, dense_below=0 if on_cpu else dense_below)
    dense = read_with_progress(job, progress, None, lambda call: None, answer=max_new_tokens)
    sparse = read_with_progress(job, progress, job.policy, recorder, dense_below=dense_below, answer=max_new_tokens)
    report = _report(job, dense, sparse)
    if as_json:
        print_json(report)
    else:
        label = job.spec if len(job.spec) <= _LONGEST_LABEL else job.policy.name
        _print(report, escape(label), sparse.dense_reasons, verbose)
    if plot is not None:
        with progress.status("drawing"):
            save_picture(job, sparse, recorder, file=plot)
        progress.print(f"wrote {plot}", markup=False, soft_wrap=True)
    return MISSED if report["sparse"]["found"] is False else 0


def _report(job: Job, dense: Reading, sparse: Reading) -> dict[str, Any]:
    planted = job.prompt.answer

    def facts(reading: Reading) -> dict[str, Any]:
        answer = str(job.tokenizer.decode(reading.tokens, skip_special_tokens=True)).strip()
        return {
            "time_to_first_token_seconds": reading.seconds,
            "attention_seconds": sum(reading.attention_seconds),
            "answer": answer,
            "found": None if planted is None else planted in answer,
        }

    layers = [
        {"layer": call.layer, "density": call.density, "sparse": call.sparse, "reason": call.reason,
         "dense_seconds": before, "seconds": after}
        for call, before, after in zip(sparse.calls, dense.attention_seconds, sparse.attention_seconds, strict=True)
    ]  # fmt: skip
    return {
        **job.describe(),
        "planted": planted,
        "dense": facts(dense),
        "sparse": {**facts(sparse), "density": sparse.density, "layers": layers},
        "ratio": {
            "time_to_first_token": dense.seconds / sparse.seconds,
            "attention": sum(dense.attention_seconds) / sum(sparse.attention_seconds),
        },
        "agreement": agreement(dense, sparse),
    }


def _print(report: dict[str, Any], label: str, dense_reasons: str, verbose: bool) -> None:
    def times(before: float, after: float) -> tuple[str, str, str]:
        return f"{before:.3f} s", f"{after:.3f} s", f"{before / after:.2f}x"

    console, dense, sparse, near = output(), report["dense"], report["sparse"], report["agreement"]
    head = "{model}\n{prompt_tokens} prompt tokens, {device}, {dtype}, {threads} threads, torch {torch}; policy {spec}"
    console.print(head.format(**report), markup=False, soft_wrap=True)
    if verbose:
        layers = Table("layer", "density", "dense", label, "ratio", "how")
        for layer in sparse["layers"]:
            how = "sparse" if layer["sparse"] else f"dense: {layer['reason']}"
            both = times(layer["dense_seconds"], layer["seconds"])
            layers.add_row(str(layer["layer"]), f"{layer['density']:.3f}", *both, how)
        console.print(layers)
    table = Table("", "dense", label, "ratio")
    table.add_row("time to first token", *times(dense["time_to_first_token_seconds"], sparse["time_to_first_token_seconds"]))
    table.add_row("in attention", *times(dense["attention_seconds"], sparse["attention_seconds"]))
    table.add_row("kept density", "1.000", f"{sparse['density']:.3f}", "")
    table.add_row("answer", Text(dense["answer"]), Text(sparse["answer"]), "")
    if report["planted"] is not None:
        table.add_row(f"planted {report['planted']} found", *("yes" if one["found"] else "no" for one in (dense, sparse)), "")
    console.print(table)
    if not any(layer["sparse"] for layer in sparse["layers"]):
        console.print(f"No layer ran sparse ({dense_reasons}).")
    console.print(
        f"Agreement over the last {near['positions']} positions: likeliest token the same in {near['top1']:.1%}, "
        f"KL(dense, {label}) {near['kl']:.4f} nats"
    )
