"""A fault inside attention leaves the model as it was, and says where it happened."""

import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tests.toys import toy

from stem_attention import Policy, Stem, UnsupportedError

pytest.importorskip("transformers")
hosts = pytest.importorskip("stem_attention.integrations.transformers")

SPARSE = Stem(block_size=16, stride=4)
WHERE = "[in layer 1, LlamaAttention: query (1, 4, 200, 8), key (1, 2, 200, 8), torch.float32]"
PROMPT = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    model = toy("llama", num_hidden_layers=3, eos_token_id=None)
    model.set_attn_implementation("stem")
    return model


def raising(kind, *args):
    def fault():
        raise kind(*args)

    return fault


def allocate_too_much():
    torch.empty(1 << 55, dtype=torch.uint8).fill_(1)


FAULTS = {
    "accelerator": (raising(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"), torch.OutOfMemoryError),
    "real allocation": (allocate_too_much, RuntimeError),
    "wrong index": (raising(IndexError, "index 7 is out of bounds"), IndexError),
    "refusal": (raising(UnsupportedError, "cannot run"), UnsupportedError),
    "bad value": (raising(ValueError, "scale: expected a number"), ValueError),
    "no message": (raising(RuntimeError), RuntimeError),
    "missing key": (raising(KeyError, "x"), KeyError),
    "interrupt": (raising(KeyboardInterrupt, "now"), KeyboardInterrupt),
}


@dataclass(frozen=True)
class Failing(Policy):
    """Selects as Stem does, until the second layer fails."""

    name: ClassVar[str] = "failing"

    fault: str
    block_size: int = 16

    def __call__(self, q, k, v, *, scale=None, prompt_len=None):
        queries = self.once("queries", list)
        queries.append(weakref.ref(q))
        if len(queries) == 2:
            FAULTS[self.fault][0]()
        return SPARSE(q, k, v, scale=scale, prompt_len=prompt_len)


@dataclass(frozen=True)
class Nonsense(Policy):
    """Selects nothing that there is."""

    name: ClassVar[str] = "nonsense"

    block_size: int = 16

    def __call__(self, q, k, v, *, scale=None, prompt_len=None):
        return "no selection"


def read(model, policy=SPARSE):
    with torch.no_grad(), hosts.use_policy(policy, dense_below=0):
        return model(PROMPT).logits


def answer(model, policy=SPARSE):
    with torch.no_grad(), hosts.use_policy(policy, dense_below=0):
        return model.generate(PROMPT, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "interrupt"])
@pytest.mark.parametrize("use", [read, answer])
def test_a_fault_names_layer_and_shapes_keeps_its_type_and_leaves_the_model_usable(name, use, model):
    expected = use(model)
    with pytest.raises(FAULTS[name][1]) as raised:
        use(model, Failing(name))
    assert type(raised.value) is FAULTS[name][1]
    assert WHERE in str(raised.value)
    assert str(raised.value).count("[in layer") == 1
    assert torch.equal(use(model), expected)
    with torch.no_grad():  # outside of use_policy nothing of the failing policy is left
        assert model(PROMPT).logits.isfinite().all()


def test_a_fault_in_the_library_itself_names_layer_and_shapes(model):
    with pytest.raises(ValueError, match="^policy: expected Nonsense .*got str.*from_mask") as raised:
        read(model, Nonsense())
    assert WHERE.replace("layer 1", "layer 0") in str(raised.value)


def test_dropout_in_training_is_refused_with_the_layer(model, monkeypatch):
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.1)
    for module in model.modules():
        monkeypatch.setattr(module, "training", True)
    with (
        pytest.raises(UnsupportedError, match=r"^dropout: .*\[in layer 0, LlamaAttention: "),
        hosts.use_policy(SPARSE, dense_below=0),
    ):
        model(PROMPT)


def test_an_interrupt_passes_as_it_is(model):
    with pytest.raises(KeyboardInterrupt) as raised:
        read(model, Failing("interrupt"))
    assert raised.value.args == ("now",)


def test_many_faults_keep_no_memory(model):
    policies = [Failing("accelerator") for _ in range(5)]
    for policy in policies:
        with pytest.raises(torch.OutOfMemoryError):
            read(model, policy)
    gc.collect()
    held = [reference for policy in policies for reference in policy.once("queries", list)]
    assert len(held) == 10
    assert not any(reference() is not None for reference in held)
