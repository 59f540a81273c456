"""A fault inside attention leaves the model as it was, and says where it happened."""

import pytest
import torch

from stem_attention import StemConfig, UnsupportedError
from stem_attention.policies import Stem

transformers = pytest.importorskip("transformers")
hosts = pytest.importorskip("stem_attention.integrations.transformers")

SPARSE = Stem(StemConfig(dense_below=0, block_size=16, stride=4))
WHERE = "[in layer 1, LlamaAttention: query (1, 4, 200, 16), key (1, 2, 200, 16), torch.float32]"
PROMPT = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    hosts.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="stem").eval()


class Failing:
    """Selects as Stem does, until the given call fails."""

    name = "failing"

    def __init__(self, fault, at=1):
        self.fault, self.left = fault, at

    def __call__(self, q, k, v, *, scale=None, prompt_len=None):
        if self.left == 0:
            self.fault()
        self.left -= 1
        return SPARSE(q, k, v, scale=scale, prompt_len=prompt_len)


def raising(kind, *args):
    def fault():
        raise kind(*args)

    return fault


def allocate_too_much():
    torch.empty(1 << 55, dtype=torch.uint8).fill_(1)


def read(model, policy=SPARSE):
    with torch.no_grad(), hosts.configure(policy):
        return model(PROMPT).logits


def answer(model, policy=SPARSE):
    with torch.no_grad(), hosts.configure(policy):
        return model.generate(PROMPT, max_new_tokens=5, do_sample=False)


FAULTS = {
    "accelerator": (raising(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"), torch.OutOfMemoryError),
    "real allocation": (allocate_too_much, RuntimeError),
    "wrong index": (raising(IndexError, "index 7 is out of bounds"), IndexError),
    "refusal": (raising(UnsupportedError, "cannot run"), UnsupportedError),
    "bad value": (raising(ValueError, "scale: expected a number"), ValueError),
    "no message": (raising(RuntimeError), RuntimeError),
    "missing key": (raising(KeyError, "x"), KeyError),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("use", [read, answer])
def test_a_fault_names_layer_and_shapes_keeps_its_type_and_leaves_the_model_usable(name, use, model):
    fault, kind = FAULTS[name]
    expected = use(model)
    with pytest.raises(kind) as raised:
        use(model, Failing(fault))
    assert type(raised.value) is kind
    assert WHERE in str(raised.value)
    assert str(raised.value).count("[in layer") == 1
    assert torch.equal(use(model), expected)
    with torch.no_grad():  # outside of configure nothing of the failing policy is left
        assert model(PROMPT).logits.isfinite().all()


def test_a_fault_in_the_library_itself_names_layer_and_shapes(model):
    with (
        torch.no_grad(),
        hosts.configure(lambda *_, **__: "no selection"),
        pytest.raises(ValueError, match="selection") as raised,
    ):
        model(PROMPT)
    assert WHERE.replace("layer 1", "layer 0") in str(raised.value)
    assert str(raised.value).startswith("selection: expected a BlockSelection, got str; ")


def test_a_gradient_is_refused_with_the_layer(model):
    with pytest.raises(UnsupportedError, match=r"no backward pass .*\[in layer 0, LlamaAttention: "), hosts.configure(SPARSE):
        model(PROMPT)


def test_an_interrupt_passes_as_it_is(model):
    with pytest.raises(KeyboardInterrupt) as raised:
        read(model, Failing(raising(KeyboardInterrupt, "now")))
    assert raised.value.args == ("now",)


def test_many_faults_keep_no_memory(model):
    import gc
    import weakref

    held = []

    class Watching(Failing):
        def __call__(self, q, k, v, *, scale=None, prompt_len=None):
            held.append(weakref.ref(q))
            return super().__call__(q, k, v, scale=scale, prompt_len=prompt_len)

    for _ in range(5):
        with pytest.raises(torch.OutOfMemoryError):
            read(model, Watching(raising(torch.OutOfMemoryError, "full")))
    gc.collect()
    assert len(held) == 10
    assert not any(reference() is not None for reference in held)
