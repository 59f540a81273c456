"""There is no derivative, so none is given: a clear error where one would be needed, in every way torch asks for one."""

import pytest
import torch
from tests.rigs import INTERPRETED, Rig
from torch.autograd import forward_ad

import stem_attention as sa
from stem_attention.testing import pack

pytestmark = pytest.mark.skipif(INTERPRETED, reason="refused before a backend is chosen")

RIG = Rig("torch")
Q, K, V = RIG.qkv(3.3, 3.3)
SELECTION = RIG.select(Q, K, V)

SPARSE = {"policy": RIG.policy, "dense_below": 0}

CALLS = {
    "stem_attention": lambda q, k, v: sa.stem_attention(q, k, v, **SPARSE),
    "stem_attention with lse": lambda q, k, v: sa.stem_attention(q, k, v, **SPARSE, return_lse=True)[0],
    "dense": lambda q, k, v: sa.stem_attention(q, k, v, dense_below=1 << 20),
    "block_sparse_attention": lambda q, k, v: sa.block_sparse_attention(q, k, v, SELECTION),
    "varlen": lambda q, k, v: sa.stem_attention_varlen(**pack([(q, k, v)]), **SPARSE),
}
ASKS = {
    "backward": lambda f, x: f(x.clone().requires_grad_()).sum().backward(),
    "func.grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "func.vjp": torch.func.vjp,
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(lambda y: f(y).sum())(x),
    "checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x.clone().requires_grad_(), use_reentrant=False),
}


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("call", CALLS)
def test_a_derivative_is_refused_and_never_zero(call, ask, which):
    def function(x):
        return CALLS[call](*(x if i == which else y for i, y in enumerate((Q, K, V))))

    with pytest.raises(sa.UnsupportedError, match="no backward pass|no forward-mode derivative"):
        ASKS[ask](function, (Q, K, V)[which])


def test_dual_numbers_are_refused_where_they_come_in():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, torch.ones_like(Q))
        with pytest.raises(sa.UnsupportedError, match="forward-mode"):
            CALLS["stem_attention"](dual, K, V)
        assert torch.equal(CALLS["stem_attention"](Q, K, V), CALLS["stem_attention"](Q, K, V))


@pytest.mark.newer_host
def test_compiled_code_refuses_too():
    torch.compiler.reset()
    compiled = torch.compile(CALLS["stem_attention"], backend="aot_eager", fullgraph=True)
    with pytest.raises((sa.UnsupportedError, torch._dynamo.exc.Unsupported), match="no backward pass"):
        compiled(Q.clone().requires_grad_(), K, V)


def test_vmap_is_a_batch():
    several = torch.stack([Q, Q * 0.5])
    out = torch.vmap(lambda q: CALLS["stem_attention"](q, K, V))(several)
    assert torch.equal(out, torch.stack([CALLS["stem_attention"](q, K, V) for q in several]))
