"""A tiny random model with a tokenizer, saved as users save theirs."""

from pathlib import Path

import pytest
import torch

TINY_CONTEXT = 4096


def save_tokenizer(directory: Path) -> None:
    """One token per byte, so that any text can be read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama: 2 layers, 4 query heads, 2 kv heads, 4096 tokens of context."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TINY_CONTEXT, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a model whose class has its own attention."""
    from transformers import BloomConfig, BloomForCausalLM

    directory = tmp_path_factory.mktemp("tiny_bloom")
    BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory
