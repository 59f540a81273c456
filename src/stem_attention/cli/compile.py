"""``stem-attention compile``: fill Triton's cache, so that no first prompt waits for a compiler."""

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.table import Table

from stem_attention.cli import options
from stem_attention.cli.errors import UserError, blaming, need
from stem_attention.cli.job import ticking
from stem_attention.cli.system import output, print_json, progress_console
from stem_attention.models.shapes import MODELS

_LENGTHS: Any = "8192,16384,32768,65536,131072"
_BFLOAT16: Any = "bfloat16"
_USUAL_HEADS = "llama-3.1-8b"


def precompile(
    arch: Annotated[str, options.option("sm80, sm90, sm100, ...; native is that of the GPU here.", "NAME")] = "native",
    policy: options.PolicyOption = options.MASS,
    lengths: options.Lengths = _LENGTHS,
    model: Annotated[
        str | None, options.option(f"Take the heads of a model: {', '.join(MODELS)}.", "NAME", _USUAL_HEADS)
    ] = None,
    heads: options.HeadCount = None,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = None,
    value_dim: Annotated[
        int | None, options.option("Dimension of a value.", shown="that of a head", min=1, rich_help_panel=options.HEADS)
    ] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="Compile for attention sinks.")] = False,
    softcap: Annotated[bool, typer.Option("--softcap", help="Compile for soft-capped scores.")] = False,
    dtype: Annotated[
        options.DtypeName, options.option("bfloat16 or float16.", "NAME", parser=options.one_of(options.DtypeName))
    ] = _BFLOAT16,
    page_size: Annotated[
        int | None, options.option("Compile for packed batches over a cache of such pages too.", shown="no", min=1)
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Compile the GPU kernels of a prefill into Triton's cache, also for a card that is not here.

    Then no first prompt waits for a compiler: run it where an image is built, with TRITON_CACHE_DIR set as it will be later.
    """
    need("triton", purpose="compile")
    from stem_attention.backends.precompile import Calls
    from stem_attention.backends.precompile import precompile as fill_cache
    from stem_attention.backends.triton.offline import Compilation, cache_directory

    if dtype not in (options.DtypeName.bfloat16, options.DtypeName.float16):
        raise UserError(f"--dtype: expected bfloat16 or float16, got {dtype.value!r}; kernels compute no other")
    sizes = options.read_heads(MODELS[_USUAL_HEADS], model, heads, kv_heads, head_dim)
    if arch == "native":
        if not torch.cuda.is_available() or torch.version.hip is not None:
            raise UserError("--arch: native needs an NVIDIA GPU, and there is none; name an architecture, as in --arch sm90")
        arch = "sm{}{}".format(*torch.cuda.get_device_capability())
    form: dict[str, Any] = {"value_dim": value_dim, "sinks": sinks, "softcap": softcap}
    calls = Calls(lengths, **vars(sizes), dtype=getattr(torch, dtype.value), page_size=page_size, **form)
    made: list[Compilation] = []
    with (
        ticking(progress_console(), f"kernels for {arch}", None) as tick,
        blaming("--policy: ", arch="--arch", head_dim="--head-dim", value_dim="--value-dim"),
    ):

        def add(kernel: Compilation) -> None:
            made.append(kernel)
            tick()

        backend = fill_cache(arch, calls, policy.at(max(lengths)), add)
    cache = cache_directory()
    if as_json:
        print_json({"arch": arch, "backend": backend, "cache": cache, "kernels": [asdict(kernel) for kernel in made]})
        return 0
    table, new = Table("kernel", "", "time", box=SIMPLE), sum(not kernel.cached for kernel in made)
    for kernel in made:
        table.add_row(kernel.kernel, "cached" if kernel.cached else "compiled", f"{kernel.seconds:.2f} s")
    output().print(table)
    said = f"{len(made)} kernels of backend {backend} for {arch} lie in {cache}, {new} of them new."
    output().print(said, soft_wrap=True)
    return 0
