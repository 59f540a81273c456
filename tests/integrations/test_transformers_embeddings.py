"""Causal embedding and reranking models, as Qwen3-Embedding and Qwen3-Reranker are, through sentence-transformers."""

import re
from pathlib import Path

import pytest
import torch
from tests.toys import VOCABULARY, byte_tokenizer

from .tiny import BY_MASS, KEEP_ALL, SMALL, hosts, transformers

sentences = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text()
STEM = {"attn_implementation": "stem"}
# Documents of different lengths in one batch, one of them too short to be read sparsely, a query beside a long text.
DOCUMENTS = [" ".join(f"w{(i * 7 + seed) % 90}" for i in range(length)) for seed, length in enumerate((300, 90, 4, 211))]
PAIRS = [("w3 w4", document) for document in DOCUMENTS]


def config(**changes):
    return transformers.Qwen3Config(**{**SMALL, "vocab_size": VOCABULARY, "pad_token_id": 0, **changes})


def save(model, directory, side="left"):
    """Save a model beside a tokenizer that pads."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["left", "right"])
def embedder(request, tmp_path_factory):
    """A directory as Qwen3-Embedding has one: last-token pooling and normed vectors."""
    torch.manual_seed(0)
    path = save(transformers.Qwen3Model(config()).eval(), tmp_path_factory.mktemp("embedder"), request.param)
    modules = pytest.importorskip("sentence_transformers.models")
    reader = modules.Transformer(str(path), max_seq_length=512)
    pooling = modules.Pooling(SMALL["hidden_size"], pooling_mode="lasttoken")
    model = sentences.SentenceTransformer(modules=[reader, pooling, modules.Normalize()], device="cpu")
    model.save(str(path / "model"))
    return path / "model"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.Qwen3ForSequenceClassification(config(num_labels=1)).eval()
    return save(model, tmp_path_factory.mktemp("reranker"))


def run(work, policy):
    """A result, and the tokens and reason of every call."""
    calls = []
    with hosts.use_policy(policy, dense_below=0, observer=calls.append):
        result = torch.as_tensor(work())
    return result, {(call.q_len, call.reason) for call in calls}


def test_documents_embed_as_on_sdpa_with_everything_kept(embedder):
    assert re.search(r'SentenceTransformer\(name, model_kwargs=\{"attn_implementation": "stem"\}\)', PAGE)
    host = sentences.SentenceTransformer(str(embedder), device="cpu")
    stem = sentences.SentenceTransformer(str(embedder), model_kwargs=STEM, device="cpu")
    expected = torch.as_tensor(host.encode(DOCUMENTS, batch_size=4))
    found, calls = run(lambda: stem.encode(DOCUMENTS, batch_size=4), KEEP_ALL)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert {reason for _, reason in calls} == {"prefill"}
    sparse, _ = run(lambda: stem.encode(DOCUMENTS, batch_size=4), BY_MASS)
    assert (sparse - expected).abs().max() > 1e-4, "the policy had nothing to leave out"


def test_a_document_does_not_depend_on_its_batch(embedder):
    stem = sentences.SentenceTransformer(str(embedder), model_kwargs=STEM, device="cpu")
    together, _ = run(lambda: stem.encode(DOCUMENTS, batch_size=4), BY_MASS)
    alone, _ = run(lambda: stem.encode(DOCUMENTS, batch_size=1), BY_MASS)
    # Alone the short one has too few queries to be read sparsely, which for one block is the same.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_reranker_scores_as_on_sdpa_with_everything_kept(reranker):
    assert re.search(r'CrossEncoder\(name, model_kwargs=\{"attn_implementation": "stem"\}\)', PAGE)
    host = sentences.CrossEncoder(str(reranker), device="cpu", max_length=512)
    stem = sentences.CrossEncoder(str(reranker), model_kwargs=STEM, device="cpu", max_length=512)
    expected = torch.as_tensor(host.predict(PAIRS))
    found, calls = run(lambda: stem.predict(PAIRS), KEEP_ALL)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert "prefill" in {reason for _, reason in calls}
