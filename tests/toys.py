"""Toys for tests that need a language model: a tokenizer with one token per byte, and random models of any class."""

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 257
CONTEXT = 4096
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def byte_tokenizer() -> Any:
    """A token for each byte, so that any text can be read; token 0 ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def toy(model_type: str, **changes: Any) -> Any:
    """A random model of a type that ``CONFIG_MAPPING`` of transformers knows: 2 layers, 4 query heads, 2 kv heads."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SIZES, **changes})).eval()


def save(model: Any, directory: Path) -> Path:
    """Save a model and the byte tokenizer as users save theirs."""
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def listening(module: str) -> str:
    """Code of a command that hears Ctrl-C: what a shell starts in the background ignores it, and so would these tests."""
    return f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from {module} import main
sys.exit(main(sys.argv[1:]))
"""


def without(packages: tuple[str, ...]) -> str:
    """Code after which Python finds none of some packages."""
    return f"""
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {packages!r} else find(name, path, target)
finder.find_spec = classmethod(find_spec)
"""
