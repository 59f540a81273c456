"""First derivatives are right in every way torch asks for one; what there is none of is refused by name and never zero."""

import pytest
import torch
from tests.rigs import INTERPRETED, Rig
from torch.autograd import forward_ad

import stem_attention as sa
from stem_attention.testing import exact_attention, pack, relative_error, token_mask

pytestmark = pytest.mark.skipif(INTERPRETED, reason="refused before a backend is chosen; interpreted.py judges the kernels")

RIG = Rig("torch")
Q, K, V = RIG.qkv(3.3, 3.3)
SELECTION = RIG.select(Q, K, V)

SPARSE = {"policy": RIG.policy, "dense_below": 0}

CALLS = {
    "stem_attention": lambda q, k, v: sa.stem_attention(q, k, v, **SPARSE),
    "stem_attention with lse": lambda q, k, v: sa.stem_attention(q, k, v, **SPARSE, return_lse=True)[0],
    "dense": lambda q, k, v: sa.stem_attention(q, k, v, dense_below=1 << 20),
    "block_sparse_attention": lambda q, k, v: sa.block_sparse_attention(q, k, v, SELECTION),
    "varlen": lambda q, k, v: sa.stem_attention_varlen(**pack([(q, k, v)]), **SPARSE)[None],
}


def backward(f, x):
    leaf = x.clone().requires_grad_()
    f(leaf).square().sum().backward()
    return leaf.grad


def checkpoint(f, x):
    return backward(lambda y: torch.utils.checkpoint.checkpoint(f, y, use_reentrant=False), x)


REVERSE = {
    "backward": backward,
    "checkpoint": checkpoint,
    "func.grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "func.vjp": lambda f, x: torch.func.vjp(lambda y: f(y).square().sum(), x)[1](torch.tensor(1.0))[0],
}
FORWARD = {
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(lambda y: f(y).sum())(x),
}


def create_graph(f, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf).square().sum(), leaf, create_graph=True)
    gradient.sum().backward()


SECOND = {
    "create_graph": create_graph,
    "func.grad of func.grad": lambda f, x: torch.func.grad(lambda y: REVERSE["func.grad"](f, y).sum())(x),
    "func.jvp of func.grad": lambda f, x: torch.func.jvp(lambda y: REVERSE["func.grad"](f, y), (x,), (torch.ones_like(x),)),
    "func.jacrev of func.grad": lambda f, x: torch.func.jacrev(lambda y: REVERSE["func.grad"](f, y).sum())(x),
}


def of(call, which):
    """The call as a function of one of its inputs, and that input."""
    return lambda x: CALLS[call](*(x if i == which else y for i, y in enumerate((Q, K, V)))), (Q, K, V)[which]


def expected(call, which):
    inputs = [x.double().requires_grad_() for x in (Q, K, V)]
    mask = torch.ones(Q.shape[1], K.shape[1], dtype=torch.bool).tril() if call == "dense" else token_mask(SELECTION)
    return torch.autograd.grad(exact_attention(*inputs, mask)[0].square().sum(), inputs)[which]


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("ask", REVERSE)
@pytest.mark.parametrize("call", CALLS)
def test_a_gradient_is_right_however_torch_asks_for_it(call, ask, which):
    assert relative_error(REVERSE[ask](*of(call, which)), expected(call, which)) < 1e-5


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("ask", FORWARD)
@pytest.mark.parametrize("call", CALLS)
def test_a_forward_derivative_is_refused_and_never_zero(call, ask, which):
    with pytest.raises(sa.UnsupportedError, match="no forward-mode derivative"):
        FORWARD[ask](*of(call, which))


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("ask", SECOND)
@pytest.mark.parametrize("call", [call for call in CALLS if call != "dense"])  # torch's own has one
def test_a_second_derivative_is_refused_and_never_zero(call, ask, which):
    with pytest.raises(sa.UnsupportedError, match="no second derivative|no forward-mode derivative"):
        SECOND[ask](*of(call, which))


def test_a_gradient_through_pages_is_refused():
    batch = pack([(Q, K, V)], 16)
    batch["q"] = batch["q"].requires_grad_()
    with pytest.raises(sa.UnsupportedError, match="page_table"):
        sa.stem_attention_varlen(**batch, **SPARSE)
    with torch.no_grad():
        sa.stem_attention_varlen(**batch, **SPARSE)


def test_dual_numbers_are_refused_where_they_come_in():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, torch.ones_like(Q))
        with pytest.raises(sa.UnsupportedError, match="forward-mode"):
            CALLS["stem_attention"](dual, K, V)
        assert torch.equal(CALLS["stem_attention"](Q, K, V), CALLS["stem_attention"](Q, K, V))


@pytest.mark.newer_host
def test_compiled_code_gives_the_gradient_too():
    torch.compiler.reset()
    compiled = torch.compile(CALLS["stem_attention"], backend="aot_eager", fullgraph=True)
    assert torch.equal(backward(lambda q: compiled(q, K, V), Q), backward(lambda q: CALLS["stem_attention"](q, K, V), Q))


def test_vmap_is_a_batch():
    several = torch.stack([Q, Q * 0.5])
    out = torch.vmap(lambda q: CALLS["stem_attention"](q, K, V))(several)
    assert torch.equal(out, torch.stack([CALLS["stem_attention"](q, K, V) for q in several]))
    gradients = torch.vmap(lambda q: REVERSE["func.grad"](lambda q: CALLS["stem_attention"](q, K, V), q))(several)
    assert torch.equal(gradients[1], backward(lambda q: CALLS["stem_attention"](q, K, V), several[1]))


def test_nothing_is_kept_for_a_gradient_that_nobody_can_ask_for():
    leaf = Q.clone().requires_grad_()
    with torch.no_grad():
        plain = CALLS["stem_attention"](leaf, K, V)
    assert not plain.requires_grad
    assert torch.equal(plain, CALLS["stem_attention"](leaf, K, V))
