"""The SGLang backend on SGLang's own batches, layers and pools, or on stand-ins of their shape: see sglang_host.py."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import stem_attention as sa
from stem_attention.policies import SinkWindow
from stem_attention.testing import structured_qkv

from . import sglang_host
from .sglang_host import DIM, HEADS, KV_HEADS, LAYERS, PARALLEL, AttentionType, make_batch, make_exec, make_layer, make_runner

from stem_attention.integrations.sglang import plugin  # isort: skip  (after the host, which may stand in for sglang)
from stem_attention.integrations.serving.counters import COUNTERS  # isort: skip
from stem_attention.integrations.sglang import backend as sglang_backend, layers as sglang_layers  # isort: skip

SPARSE = sa.Stem(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1)
BY_MASS = sa.Mass(block_size=16, query_pool=8, key_pool=8, sink_blocks=1, local_blocks=1, tail_blocks=1)
# Forced blocks alone, blocks as by share, every block: each head of each layer keeps something else.
FACTORS = ((1e6, 1.0, 1e-6, 4.0), (4.0, 1e-6, 1e6, 1.0))


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """SGLang's launcher has published its arguments."""
    monkeypatch.setattr(sglang_layers, "get_exec", make_exec)


class Server:
    """A runner, its backend, and prompts whose keys go to scrambled slots."""

    def __init__(self, monkeypatch, lengths, policy=SPARSE, dense_below=64, kv_dtype=torch.float32, **settings):
        spec = policy.to_dict() if isinstance(policy, sa.Policy) else policy
        given = {"policy": spec, "dense_below": dense_below, "min_query_len": 32, **settings}
        monkeypatch.setenv("STEM_ATTENTION_SETTINGS", json.dumps(given))
        self.runner = make_runner(kv_dtype=kv_dtype)
        plugin.register()
        self.backend = plugin.ATTENTION_BACKENDS["stem"](self.runner)
        COUNTERS.reset()
        self.prompts = [structured_qkv(1, n, n, HEADS, KV_HEADS, DIM, seed=i) for i, n in enumerate(lengths)]
        order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))[: sum(lengths)] + 1
        self.slots = list(order.split(lengths))

    def batch(self, spans, mode="EXTEND", whole=True, padding=0):
        """Tokens ``[low, high)`` of every prompt as one batch: its metadata and q, k, v as a model's layer makes them."""
        slots = [part[:high] for part, (_, high) in zip(self.slots, spans, strict=True)]
        lengths = [len(part) for part in self.slots] if whole else None
        new = [high - low for low, high in spans]
        batch = make_batch(mode, slots, new, lengths, self.runner.req_to_token_pool.req_to_token)
        parts = [[x[0, low:high] for x in prompt] for prompt, (low, high) in zip(self.prompts, spans, strict=True)]
        q, k, v = (torch.cat(column) for column in zip(*parts, strict=True))
        return batch, torch.cat([q.flatten(1), torch.ones(padding, HEADS * DIM)]), k, v

    def run(self, *args, layer=None, backend=None, extra=None, **kwargs):
        batch, q, k, v = self.batch(*args, **kwargs)
        backend = self.backend if backend is None else backend
        backend.init_forward_metadata(batch)
        out = backend.forward_extend(q, k, v, make_layer() if layer is None else layer, batch, **(extra or {}))
        assert out.shape == q.shape
        return out

    def expected(self, i, low, high, policy=SPARSE, prompt_len=None, dense_below=64, **extra):
        q, k, v = (x[:, :high] for x in self.prompts[i])
        out = sa.stem_attention(q[:, low:], k, v, policy=policy, prompt_len=prompt_len, dense_below=dense_below, **extra)
        return out[0].flatten(1)

    def dense(self, i, low, high):
        return self.expected(i, low, high, dense_below=10**9)


def test_prompts_of_one_batch_are_read_as_if_contiguous_and_alone_bit_for_bit(monkeypatch):
    server = Server(monkeypatch, [300, 77, 128])
    out = server.run([(0, 300), (0, 77), (0, 128)])
    assert torch.equal(out, torch.cat([server.expected(0, 0, 300), server.expected(1, 0, 77), server.expected(2, 0, 128)]))
    assert (COUNTERS.sparse_rows, COUNTERS.sparse_tokens, dict(COUNTERS.dense_rows)) == (3, 505, {})
    selections = [sa.select_blocks(*prompt, policy=SPARSE) for prompt in server.prompts]
    assert COUNTERS.kept_blocks == sum(int(selection.counts.sum()) for selection in selections)
    assert 0.2 < COUNTERS.density < 0.9


@pytest.mark.parametrize("cuts", [(0, 96, 192, 300), (0, 37, 101, 250, 300)], ids=["block borders", "anywhere"])
def test_chunks_keep_the_budgets_of_the_whole_prompt(cuts, monkeypatch):
    server = Server(monkeypatch, [300])
    chunks = [server.run([(low, high)]) for low, high in pairwise(cuts)]
    for chunk, (low, high) in zip(chunks, pairwise(cuts), strict=True):
        assert torch.equal(chunk, server.expected(0, low, high, prompt_len=300))
    if all(cut % 16 == 0 for cut in cuts[:-1]):
        torch.testing.assert_close(torch.cat(chunks), server.expected(0, 0, 300), atol=1e-5, rtol=1e-5)


def test_without_the_prompts_length_the_tokens_so_far_stand_in(monkeypatch):
    server = Server(monkeypatch, [300])
    server.run([(0, 96)], whole=False)
    assert torch.equal(server.run([(96, 192)], whole=False), server.expected(0, 96, 192))
    assert SPARSE.row_counts(12) != SPARSE.row_counts(19)[:12]


def test_a_cached_prefix_is_read_from_the_pool(monkeypatch):
    server = Server(monkeypatch, [300])
    batch, _, k, v = server.batch([(0, 200)])
    server.runner.token_to_kv_pool.set_kv_buffer(make_layer(), sglang_backend.KVWriteLoc.for_batch(batch), k, v)
    assert torch.equal(server.run([(200, 300)]), server.expected(0, 200, 300))


@pytest.mark.parametrize("scales", [(None, None), (0.5, 0.25)], ids=["no scales", "scales"])
def test_a_pool_of_fp8_numbers_is_read_with_the_layers_scales(scales, monkeypatch):
    k_scale, v_scale = (None if x is None else torch.tensor(x) for x in scales)
    server = Server(monkeypatch, [300], kv_dtype=torch.float8_e4m3fn)
    before = [x.clone() for x in server.prompts[0]]
    out = server.run([(0, 300)], layer=make_layer(k_scale=k_scale, v_scale=v_scale))
    assert all(map(torch.equal, server.prompts[0], before)), "what the model goes on with"
    q, *stored = server.prompts[0]
    read = [(x / (s or 1.0)).to(torch.float8_e4m3fn).float() * (s or 1.0) for x, s in zip(stored, scales, strict=True)]
    assert torch.equal(out, sa.stem_attention(q, *read, policy=SPARSE, dense_below=64)[0].flatten(1))
    assert not torch.equal(out, server.expected(0, 0, 300))


def test_answers_and_short_prompts_in_a_mixed_batch_stay_dense(monkeypatch):
    server = Server(monkeypatch, [300, 50, 200])
    server.run([(0, 299), (0, 0), (0, 0)])
    COUNTERS.reset()
    out = server.run([(299, 300), (0, 50), (0, 200)], mode="MIXED")
    assert torch.equal(out[51:], server.expected(2, 0, 200))
    for rows, i, low, high in ((slice(0, 1), 0, 299, 300), (slice(1, 51), 1, 0, 50)):
        torch.testing.assert_close(out[rows], server.dense(i, low, high), atol=1e-5, rtol=1e-5)
    assert dict(COUNTERS.dense_rows) == {"short chunk": 1, "short prompt": 1}


def test_a_batch_of_short_prompts_goes_to_the_dense_backend_whole(monkeypatch):
    server = Server(monkeypatch, [50, 20])
    out = server.run([(0, 50), (0, 20)])
    assert torch.equal(out, server.run([(0, 50), (0, 20)], backend=server.backend.dense))
    assert dict(COUNTERS.dense_rows) == {"short prompts and chunks": 2}


def test_keeping_everything_equals_the_dense_backend(monkeypatch):
    server = Server(monkeypatch, [150, 130], "dense:block_size=16", dense_below=0)
    for spans in ([(0, 70), (0, 130)], [(70, 150), (130, 130)]):
        found, expected = server.run(spans), server.run(spans, backend=server.backend.dense)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert COUNTERS.density == 1


def test_rows_that_only_pad_the_batch_are_zero(monkeypatch):
    server = Server(monkeypatch, [128])
    out = server.run([(0, 128)], padding=3)
    assert torch.equal(out[:128], server.expected(0, 0, 128))
    assert not out[128:].any()


def test_each_layer_keeps_what_its_own_factors_say(monkeypatch, caplog):
    with caplog.at_level("INFO", logger=plugin.__name__):
        server = Server(monkeypatch, [300, 50], replace(BY_MASS, head_factors=FACTORS))
    assert [line.endswith("with head_factors of 2 x 4") for line in caplog.messages if line.startswith("Stem is on")] == [True]
    outputs = [server.run([(0, 300), (0, 50)], layer=make_layer(layer_id)) for layer_id in range(LAYERS)]
    kept = []
    for layer_id, out in enumerate(outputs):
        policy = replace(BY_MASS, head_factors=(FACTORS[layer_id],))
        assert torch.equal(out[:300], server.expected(0, 0, 300, policy))
        torch.testing.assert_close(out[300:], server.dense(1, 0, 50), atol=1e-5, rtol=1e-5)
        kept.append(sa.select_blocks(*server.prompts[0], policy=policy).counts.sum((0, 2)).tolist())
    assert kept[0][0] == kept[1][2] < kept[0][1] < kept[0][2] == kept[1][1] == 19 * 20 // 2
    assert not torch.equal(*(out[:300] for out in outputs))


def test_a_policy_is_served_by_the_name_of_its_class(monkeypatch):
    server = Server(monkeypatch, [300, 50], "stem_attention.policies:SinkWindow:block_size=16,window_blocks=3")
    out = server.run([(0, 300), (0, 50)])
    assert torch.equal(out[:300], server.expected(0, 0, 300, SinkWindow(window_blocks=3, block_size=16)))
    torch.testing.assert_close(out[300:], server.dense(1, 0, 50), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_tensor_parallelism_takes_the_factors_of_its_heads(rank, monkeypatch):
    whole = tuple(FACTORS[layer] + FACTORS[1 - layer] for layer in range(LAYERS))
    parallel = SimpleNamespace(**{**PARALLEL, "attn_tp_size": 2, "attn_tp_rank": rank})
    monkeypatch.setattr(sglang_layers, "get_parallel", lambda: parallel)
    monkeypatch.setattr(sglang_host, "HEADS_OF_ALL_RANKS", 2 * HEADS)
    server = Server(monkeypatch, [300], replace(BY_MASS, head_factors=whole))
    for layer_id in range(LAYERS):
        policy = replace(BY_MASS, head_factors=(FACTORS[layer_id ^ rank],))
        assert torch.equal(server.run([(0, 300)], layer=make_layer(layer_id)), server.expected(0, 0, 300, policy))


@pytest.mark.parametrize("factors", [FACTORS[:1] * 3, [row[:2] for row in FACTORS]], ids=["layers", "heads"])
def test_factors_of_another_model_are_refused_at_start_up(factors, monkeypatch):
    with pytest.raises(ValueError, match=f"^head_factors: expected 2 x 4 .* got {len(factors)} x {len(factors[0])}; run stem"):
        Server(monkeypatch, [300], replace(BY_MASS, head_factors=factors))


OTHER_LAYERS = {
    "cross-attention": {"is_cross_attention": True},
    "encoder_only attention": {"attn_type": AttentionType.ENCODER_ONLY},
    "sliding window": {"sliding_window_size": sglang_host.CONTEXT - 2},
    "chunked local attention": {"use_irope": True},
    "scores bounded by sigmoid": {"logit_cap": 30.0, "logit_capping_method": "sigmoid"},
    "scores scaled by length": {"xai_temperature_len": 1024},
    "positions inside attention (ALIBI)": {"pos_encoding_mode": "ALIBI"},
    "dense_layers": {"layer_id": 0},
}


@pytest.mark.parametrize("reason", OTHER_LAYERS)
def test_a_layer_that_stem_does_not_do_goes_to_the_dense_backend(reason, monkeypatch):
    server = Server(monkeypatch, [200], dense_layers=1)
    seen = []
    monkeypatch.setattr(server.backend.dense, "forward_extend", lambda *args, **extra: seen.append((args, extra)))
    layer = make_layer(**{"layer_id": 1, **OTHER_LAYERS[reason]})
    assert sglang_layers.layer_obstacle(layer, 1, sglang_host.CONTEXT) == reason
    batch, q, k, v = server.batch([(0, 200)])
    server.backend.init_forward_metadata(batch)
    server.backend.forward_extend(q, k, v, layer, batch, False)
    ((args, extra),) = seen
    assert (args[3], args[5], extra) == (layer, False, {})


def test_a_window_that_no_request_outgrows_is_none(monkeypatch):
    server = Server(monkeypatch, [200])
    layer = make_layer(sliding_window_size=sglang_host.CONTEXT - 1)
    assert torch.equal(server.run([(0, 200)], layer=layer), server.expected(0, 0, 200))


def test_an_argument_that_stem_does_not_know_goes_to_the_dense_backend_with_it(monkeypatch):
    server = Server(monkeypatch, [200])
    seen = []
    monkeypatch.setattr(server.backend.dense, "forward_extend", lambda *args, **extra: seen.append(extra) or args[0])
    server.run([(0, 200)], extra={"q_rope": torch.ones(HEADS)})
    server.run([(0, 200)], extra={"q_rope": None, "sinks": None, "save_kv_cache": True})
    assert [list(extra) for extra in seen] == [["q_rope"]]


def test_scores_are_capped(monkeypatch):
    server = Server(monkeypatch, [200, 40])
    out = server.run([(0, 200), (0, 40)], layer=make_layer(logit_cap=0.5))
    assert torch.equal(out[:200], server.expected(0, 0, 200, softcap=0.5))
    assert torch.equal(out[200:], server.expected(1, 0, 40, softcap=0.5))
    assert not torch.equal(out, server.run([(0, 200), (0, 40)]))


@pytest.mark.skipif(sglang_host.REAL, reason="its pool has one head dimension here")
def test_values_of_another_dimension(monkeypatch):
    server = Server(monkeypatch, [200])
    pool = server.runner.token_to_kv_pool
    pool.v_buffer = pool.v_buffer[..., :8].contiguous()
    batch, q, k, v = server.batch([(0, 200)])
    server.backend.init_forward_metadata(batch)
    out = server.backend.forward_extend(q, k, v[..., :8], make_layer(v_head_dim=8), batch)
    one = [*server.prompts[0][:2], server.prompts[0][2][..., :8]]
    assert torch.equal(out, sa.stem_attention(*one, policy=SPARSE, dense_below=64)[0].flatten(1))


def test_sinks_take_part(monkeypatch):
    server, sinks = Server(monkeypatch, [200, 40]), torch.tensor([0.0, 3.0, -2.0, 6.0])
    out = server.run([(0, 200), (0, 40)], extra={"sinks": sinks})  # the second is short, and keeps every block
    assert torch.equal(out[:200], server.expected(0, 0, 200, sinks=sinks))
    assert torch.equal(out[200:], server.expected(1, 0, 40, sinks=sinks))
    assert not torch.equal(out, server.run([(0, 200), (0, 40)]))


def test_other_batches_go_to_the_dense_backend(monkeypatch):
    server = Server(monkeypatch, [200])
    monkeypatch.setattr(server.backend.dense, "forward_extend", lambda *args, **extra: args[0] * 2)
    for mode, change in (
        ("TARGET_VERIFY", {}),
        ("EXTEND", {"extend_seq_lens_cpu": None}),
        ("EXTEND", {"encoder_lens": torch.ones(1)}),
    ):
        batch, q, k, v = server.batch([(0, 200)], mode=mode)
        for name, value in change.items():
            setattr(batch, name, value)
        server.backend.init_forward_metadata(batch)
        assert torch.equal(server.backend.forward_extend(q, k, v, make_layer(), batch), q * 2)
    assert {*COUNTERS.dense_rows} == {"encoder-decoder batch", "lengths known on the device only", "target_verify batch"}


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("use_mla_backend", True, sa.UnsupportedError, "latent attention"),
        (
            "kv_cache_dtype",
            torch.float8_e5m2,
            sa.UnsupportedError,
            "holds torch.float8_e5m2; .*--kv-cache-dtype auto or fp8_e4m3",
        ),
        ("dtype", torch.bfloat16, sa.UnsupportedError, "holds torch.float32 and the model computes torch.bfloat16"),
        ("token_to_kv_pool", object(), sa.UnsupportedError, "is a object, not one pool"),
        ("decode_attention_backend_str", "stem", ValueError, "^--decode-attention-backend: expected .+ got 'stem'"),
    ],
)
def test_what_no_layer_could_take_is_refused_at_start_up(name, value, error, says):
    runner = make_runner()
    setattr(runner, name, value)
    with pytest.raises(error, match=says):
        plugin.create(runner)


def test_prefill_in_cuda_graphs_is_refused_at_start_up(monkeypatch):
    monkeypatch.setattr(sglang_layers, "get_exec", lambda: make_exec("full"))
    with pytest.raises(sa.UnsupportedError, match="--disable-prefill-cuda-graph"):
        plugin.create(make_runner())


def test_another_batch_is_never_read_with_the_lengths_of_the_last_one(monkeypatch):
    server = Server(monkeypatch, [300])
    server.run([(0, 100)])
    batch, q, k, v = server.batch([(100, 300)])
    out = server.backend.forward_extend(q, k, v, make_layer(), batch)  # without init_forward_metadata
    assert torch.equal(out, server.expected(0, 100, 300))


def test_registering_twice_offers_one_choice_and_bad_settings_are_named(monkeypatch):
    plugin.register()
    plugin.register()
    assert plugin.ATTENTION_BACKEND_CHOICES.count("stem") == 1
    assert plugin.ATTENTION_BACKENDS["stem"] is plugin.create
    monkeypatch.setenv("STEM_ATTENTION_SETTINGS", '{"decai": 0.7}')
    with pytest.raises(ValueError, match="STEM_ATTENTION_SETTINGS: .*decai"):
        plugin.register()
