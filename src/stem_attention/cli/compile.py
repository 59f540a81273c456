"""``stem-attention compile``: fill Triton's cache, so that no first prompt waits for a compiler."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table

from stem_attention.cli.bench_report import duration
from stem_attention.cli.errors import UserError, need
from stem_attention.cli.options import check_counts, read_choice, read_dtype, read_heads, read_lengths
from stem_attention.cli.system import output, progress_console
from stem_attention.evaluation.bench_shapes import MODELS
from stem_attention.policies import Stem

if TYPE_CHECKING:
    from stem_attention.backends.triton.offline import Compilation

NATIVE = "native"
_USUAL_HEADS = MODELS["llama-3.1-8b"]
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CompileOptions:
    """Option values as they came."""

    arch: str
    lengths: str
    model: str | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    dtype: str
    page_size: int | None
    preset: str
    config: Path | None
    settings: list[str]


def compile_command(options: CompileOptions, *, as_json: bool) -> int:
    """Compile, report; returns the exit code.

    Raises:
        UserError: Some option is wrong.
    """
    need("triton", purpose="compile")
    from stem_attention.backends.precompile import Calls, precompile

    config = read_choice(Stem.name, options.preset, options.config, options.settings).config
    dtype = read_dtype(options.dtype, torch.device("cpu"))
    if dtype not in _KERNEL_DTYPES:
        raise UserError(f"--dtype: expected bfloat16 or float16, got {options.dtype!r}; kernels compute no other")
    heads = read_heads(_USUAL_HEADS, options.model, options.heads, options.kv_heads, options.head_dim)
    if options.page_size is not None:
        check_counts(page_size=options.page_size)
    architecture = _native() if options.arch == NATIVE else options.arch
    calls = Calls(read_lengths(options.lengths), heads.heads, heads.kv_heads, heads.head_dim, dtype, options.page_size)
    made: list[Compilation] = []
    with Progress(console=progress_console()) as progress:
        task = progress.add_task(f"kernels for {architecture}", total=None)

        def add(kernel: Compilation) -> None:
            made.append(kernel)
            progress.update(task, description=f"kernels for {architecture}: {len(made)}", advance=1)

        try:
            backend = precompile(architecture, calls, config, add)
        except ValueError as error:
            option, _, rest = str(error).partition(":")
            raise UserError(f"--{option.replace('_', '-')}:{rest}") from error
    _report(architecture, backend, made, as_json)
    return 0


def _native() -> str:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise UserError(f"--arch: {NATIVE} needs an NVIDIA GPU, and there is none; name an architecture, as in --arch sm90")
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _report(architecture: str, backend: str, made: list[Compilation], as_json: bool) -> None:
    from stem_attention.backends.triton.offline import cache_directory

    new = [kernel for kernel in made if not kernel.cached]
    facts: dict[str, Any] = {"arch": architecture, "backend": backend, "cache": cache_directory()}
    if as_json:
        print(json.dumps({**facts, "kernels": [asdict(kernel) for kernel in made]}))
        return
    table = Table("kernel", "", "time", box=SIMPLE)
    for kernel in made:
        table.add_row(kernel.kernel, "cached" if kernel.cached else "compiled", duration(kernel.seconds))
    console = output()
    console.print(table)
    console.print(
        f"{len(made)} kernels of backend {backend} for {architecture} lie in {facts['cache']}, {len(new)} of them new.",
        soft_wrap=True,
    )
