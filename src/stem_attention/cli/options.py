"""Options that commands share, as typer reads them; their values come out checked, and mistakes name the option."""

import os
import select
import stat
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from stem_attention.cli.errors import UserError, need
from stem_attention.cli.system import accelerator
from stem_attention.errors import nearest
from stem_attention.models.shapes import MODELS, Heads
from stem_attention.models.texts import Text
from stem_attention.policies import PolicySpec, parse_spec, policy_names

AUTO: Any = "auto"  # defaults of Device, Dtype and PolicyOption, which typer reads as if they were typed
MASS: Any = "mass"
# Groups of options in --help.
PROMPT, PICTURE, HEADS, RUNS = "The prompt", "The picture", "Heads, in place of the model's", "Where it runs"


class Choice(Enum):
    """Words of an option. Their text is the word: typer before 0.29 looks a parsed one up by it again."""

    def __str__(self) -> str:
        return str(self.value)


class DtypeName(Choice):
    """Names of dtypes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


_Choice = TypeVar("_Choice", bound=Enum)


class TokenCounts(tuple[int, ...]):
    """Values of :data:`Lengths`: typer would take a plain list for an option that repeats."""


def torch_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Resolve a dtype; ``auto`` is float32 on the CPU and bfloat16 elsewhere."""
    if name is DtypeName.auto:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, name.value)
    return found


def one_of(kind: type[_Choice]) -> Callable[[str], _Choice]:
    """Build the parser of an option that takes a value of an enumeration; a typing slip is told what was meant."""
    names = [each.value for each in kind]

    def parse(text: str) -> _Choice:
        if text in names:
            return kind(text)
        raise typer.BadParameter(
            f"expected one of {', '.join(names)}, got {text!r}; {nearest(text, names, 'pick one of these')}"
        )

    return parse


def _policy(text: str) -> PolicySpec:
    try:
        return parse_spec(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("policy: ")) from error


def _device(name: str) -> torch.device:
    here, hint = accelerator(), "`stem-attention doctor` lists them"
    if name == "auto":
        return here or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(
            f"expected cpu, cuda, cuda:1, ..., got {name!r}; {nearest(name, ('cpu', 'cuda', 'mps'), hint)}"
        ) from error
    if device.type == "cpu" and (device.index or 0) == 0:
        return torch.device("cpu")
    count = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    if (device.index or 0) >= count:
        raise typer.BadParameter(f"{name} is not there ({count} {device.type} devices); {hint}")
    return device


def _text(path: str) -> str:
    """The text of a file, or of standard input for ``-``; a byte order mark is no part of it."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8 text; convert it first") from error
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}; check the path") from error
    if not text.strip():
        raise typer.BadParameter(f"{path} is empty; write the text to read into it")
    return text


def _named_text(path: str) -> Text:
    return Text(Path(path).name, _text(path))


def _lengths(text: str) -> TokenCounts:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 11 and 0 < int(part) < 2**31 for part in parts):
        raise typer.BadParameter(f"expected numbers of tokens below 2^31 such as 8192,32768, got {text!r:.60}; correct it")
    return TokenCounts(map(int, parts))


def _png(text: str) -> Path:
    need("matplotlib", purpose="a picture")
    if Path(text).suffix.lower() != ".png":
        raise typer.BadParameter(f"expected a file that ends in .png, got {text}; the picture is a PNG")
    return _writable(text)


def _writable(text: str) -> Path:
    """A file that can be written, which leaves no trace of the trial."""
    path = Path(text)
    existed = path.exists()
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}; check the path") from error
    return path


def _directory(text: str) -> Path:
    """A directory for pictures, which is made if it is not there."""
    need("matplotlib", purpose="a picture")
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make {text}: {error.strerror}; name a directory") from error
    return Path(text)


def piped_text() -> str | None:
    """Read what is piped in; None where nothing is, or nothing but blanks, as job runners attach."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)) or not select.select([sys.stdin], [], [], 0)[0]:
            return None
    except (OSError, ValueError):  # no real standard input, or (on Windows) none that can be polled
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("what is piped in is not UTF-8 text; convert it first") from error
    return text if text.strip() else None


def read_heads(usual: Heads, model: str | None, heads: int | None, kv_heads: int | None, head_dim: int | None) -> Heads:
    """Take the heads of a model, or the usual ones, with what is given in their place."""
    if model is not None and model not in MODELS:
        fix = nearest(model, MODELS, "for others give --heads, --kv-heads and --head-dim")
        raise UserError(f"--model: expected one of {', '.join(MODELS)}, got {model!r}; {fix}")
    of_model = usual if model is None else MODELS[model]
    found = Heads(heads or of_model.heads, kv_heads or of_model.kv_heads, head_dim or of_model.head_dim)
    if found.heads % found.kv_heads:
        raise UserError(f"--kv-heads: expected a divisor of --heads {found.heads}, got {found.kv_heads}; change one of them")
    return found


def option(told: str, metavar: str = "N", shown: bool | str = True, **more: Any) -> Any:
    """Build an option from its help, what stands there for its value, the default shown there, and typer's own settings."""
    return typer.Option(metavar=metavar, help=told, show_default=shown, **more)


_POLICIES = (
    f"Which blocks to keep: NAME:FIELD=VALUE,... NAME is {', '.join(policy_names())}, a .json file that calibrate wrote, or "
    "module:Class. uniform@0.2 keeps a fifth of the blocks."
)
Model = Annotated[str | None, option("Model directory, GGUF file or hub id.", "NAME", "the embedded SmolLM2-135M-Instruct")]
PolicyOption = Annotated[PolicySpec, option(_POLICIES, "SPEC", parser=_policy)]
DenseBelow = Annotated[
    int | None, option("Run prompts of fewer tokens dense.", shown="where sparse was measured to become faster", min=0)
]
_PROMPT = "Text to read, UTF-8; - is standard input, which is also read when something is piped in."
_MADE_UP = "made-up prose with a planted number and a question about it"
PromptFile = Annotated[str | None, option(_PROMPT, "FILE", _MADE_UP, parser=_text, rich_help_panel=PROMPT)]
Seed = Annotated[int, option("Seed of what is made up; fixed, so that runs repeat.", rich_help_panel=PROMPT)]
Context = Annotated[
    int | None,
    option(
        "Tokens of the made-up prompt.",
        shown="what the model's context holds beside the answer, up to 32768",
        min=1,
        rich_help_panel=PROMPT,
    ),
]
Depth = Annotated[
    float, option("Where the number is planted: 0 start of the text, 1 end.", "X", min=0, max=1, rich_help_panel=PROMPT)
]
_NO_TEMPLATE = "Leave the prompt as it is, whatever chat template the model has."
NoChatTemplate = Annotated[bool, typer.Option("--no-chat-template", help=_NO_TEMPLATE, rich_help_panel=PROMPT)]
_DEVICE = "cpu, cuda, cuda:1, ...; auto takes the accelerator if there is one."
Device = Annotated[torch.device, option(_DEVICE, "NAME", parser=_device, rich_help_panel=RUNS)]
_DTYPE = "float32, bfloat16, float16 or float64; auto: float32 on the CPU, bfloat16 elsewhere."
Dtype = Annotated[DtypeName, option(_DTYPE, "NAME", parser=one_of(DtypeName), rich_help_panel=RUNS)]
_PLOT = "Draw kept blocks, attention, blocks per row and how far heads look. Needs matplotlib."
Plot = Annotated[Path | None, option(_PLOT, "FILE.png", parser=_png, rich_help_panel=PICTURE)]
_PANELS = "Write the picture's panels there, a PNG each. Needs matplotlib."
Panels = Annotated[Path | None, option(_PANELS, "DIRECTORY", parser=_directory, rich_help_panel=PICTURE)]
Out = Annotated[Path, option("JSON file to write, which --policy takes.", "FILE", parser=_writable)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
TextFiles = Annotated[
    list[Text] | None,
    option("UTF-8 text to read. Repeatable.", "FILE", "source code of Python's standard library", parser=_named_text),
]
Haystack = Annotated[str | None, option("Text around hidden numbers.", "FILE", "made-up prose", parser=_text)]
Lengths = Annotated[TokenCounts, option("Prompt lengths in tokens, with commas between.", "N,N,...", parser=_lengths)]
HeadCount = Annotated[int | None, option("Query heads.", shown="the model's", min=1, rich_help_panel=HEADS)]
KvHeads = Annotated[int | None, option("Key/value heads.", shown="the model's", min=1, rich_help_panel=HEADS)]
HeadDim = Annotated[int | None, option("Dimension of a head.", shown="the model's", min=1, rich_help_panel=HEADS)]
