"""The subcommand ``compile`` and its options."""

from __future__ import annotations

from typing import Annotated

import typer

from stem_attention.cli.annotations import Config, HeadDim, Heads, Json, KvHeads, Preset, Settings


def precompile(
    arch: Annotated[str, typer.Option(help="sm80, sm90, sm100, ...; native is that of the GPU here.")] = "native",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths; others with the same power of two of blocks share their kernels.")
    ] = "8192,16384,32768,65536,131072",
    model: Annotated[
        str | None, typer.Option(help="Take the heads of a model, as in bench.", show_default="llama-3.1-8b")
    ] = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    page_size: Annotated[
        int | None, typer.Option(help="Compile for packed batches over a cache of such pages too.", show_default="no")
    ] = None,
    preset: Preset = "default",
    config: Config = None,
    settings: Settings = None,
    as_json: Json = False,
) -> int:
    """Compile the GPU kernels of a prefill into Triton's cache, also for a card that is not here.

    Then no first prompt waits for a compiler: run it where an image is built, with TRITON_CACHE_DIR set as it will be later.
    """
    from stem_attention.cli.compile import CompileOptions, compile_command

    options = CompileOptions(
        arch, lengths, model, heads, kv_heads, head_dim, dtype, page_size, preset, config, settings or []
    )  # fmt: skip
    return compile_command(options, as_json=as_json)
