"""What a model is told to keep: in a `with` block, in its own config, as the default; and whom it reaches."""

import asyncio
import contextvars
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from stem_attention import UnsupportedError
from stem_attention.policies import SinkWindow

from .tiny import BY_MASS, FACTORS, KEEP_ALL, SMALL, build, hosts, logits, small_llama, tokens, transformers

FEW, MORE = (SinkWindow(sink_blocks=1, window_blocks=blocks, block_size=16) for blocks in (1, 4))
LOW, HIGH = (pytest.approx(policy.density(320)) for policy in (FEW, MORE))
PER_HEAD = replace(BY_MASS, head_factors=FACTORS)


@pytest.fixture
def llama():
    return small_llama()


@pytest.fixture(autouse=True)
def default():
    torch.compiler.reset()
    yield
    hosts.register()


def use(policy):
    return hosts.use_policy(policy, dense_below=0)


def plain(model):
    """Logits with what holds here and now."""
    with torch.no_grad():
        out = model(tokens()).logits
    return out


def density(model):
    """What a model keeps that is called here and now."""
    block = hosts.settings.OUTSIDE.innermost
    calls = []
    given = {"dense_below": block.dense_below, "dense_layers": block.dense_layers, "observer": calls.append}
    with hosts.use_policy(block.policy, **given):
        plain(model)
    return calls[-1].density


def test_the_innermost_block_counts_and_ends(llama):
    with use(FEW):
        assert density(llama) == LOW
        with use(MORE):
            assert density(llama) == HIGH
        with hosts.use_policy(MORE):  # what it leaves out comes from the model, not from the block around it
            assert density(llama) == 1
        assert density(llama) == LOW
    assert density(llama) == 1


def test_a_block_that_is_used_wrongly_says_so():
    async def coroutine(): ...

    def generator():
        yield 1

    with pytest.warns(RuntimeWarning, match="never entered and changed nothing: write `with use_policy"):
        hosts.use_policy(FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosts.use_policy(FEW)(print)
        with pytest.raises(ValueError, match="^prompt_len: expected"):
            hosts.use_policy(FEW, prompt_len=0)
        for function in (coroutine, generator):
            with pytest.raises(TypeError, match="inside this one"):
                hosts.use_policy(FEW)(function)
        block = hosts.use_policy(FEW)
        for _ in range(2):
            with block, pytest.raises(RuntimeError, match="open already"), block:
                pass


def test_tasks_have_settings_of_their_own_and_hand_them_on(llama):
    async def request(policy, inner):
        seen = []
        with use(policy):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(density(llama))
            seen.append(await asyncio.to_thread(density, llama))
            if inner:
                seen.append((await asyncio.create_task(request(MORE, False)))[0])
                seen.append(density(llama))
        await asyncio.sleep(0)
        seen.append(density(llama))
        return seen

    async def main():
        return await asyncio.gather(request(FEW, True), request(MORE, False), request(KEEP_ALL, False))

    assert asyncio.run(main()) == [[LOW] * 4 + [HIGH, LOW, 1], [HIGH] * 4 + [1], [1] * 5]
    assert hosts.settings.OUTSIDE.innermost is hosts.settings.OUTSIDE


def test_generators_leave_nothing_behind(llama):
    def stream(policy):
        with use(policy):
            yield density(llama)

    for finish in (list, reversed):
        streams = [stream(policy) for policy in (FEW, MORE, FEW)]
        assert [next(each) for each in streams] == [LOW, HIGH, LOW]
        for each in finish(streams):
            each.close()
        assert hosts.settings.OUTSIDE.innermost is hosts.settings.OUTSIDE


def run_in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_threads_are_reached_where_they_are_told_and_say_where_not(llama):
    found = []

    def work():
        plain(llama)
        found.append(density(llama))

    with ThreadPoolExecutor(1) as started_before, warnings.catch_warnings():
        warnings.simplefilter("error")
        started_before.submit(work).result()
        with use(FEW):
            run_in_a_thread(use(MORE)(work))
            run_in_a_thread(partial(contextvars.copy_context().run, work))
            started_before.submit(work).result()
            with pytest.warns(RuntimeWarning, match="does not reach a thread started inside"):
                run_in_a_thread(work)
        run_in_a_thread(work)
    assert found == [1, HIGH, LOW, 1, 1, 1]


def test_register_sets_the_default(llama):
    tables = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    before = [table["stem"] for table in tables]
    assert density(llama) == 1
    hosts.register(FEW, dense_below=0, dense_layers=1)
    assert density(llama) == LOW
    with hosts.use_policy(dense_layers=3):
        assert density(llama) == 1
    hosts.set_policy(llama, MORE, dense_below=0)
    assert density(llama) == HIGH
    hosts.set_policy(llama)
    assert llama.config.stem_attention == {"policy": FEW.to_dict(), "dense_below": None, "dense_layers": 0}
    assert [table["stem"] for table in tables] == before


@pytest.mark.newer_host
def test_settings_are_saved_and_loaded_with_their_model(llama, tmp_path):
    hosts.set_policy(llama, PER_HEAD, dense_below=64, dense_layers=1)
    llama.save_pretrained(tmp_path)
    expected, kind = plain(llama), type(llama)
    loaded = kind.from_pretrained(tmp_path, attn_implementation="stem")
    assert loaded.config.stem_attention == llama.config.stem_attention
    assert torch.equal(plain(loaded), expected)
    later = kind.from_pretrained(tmp_path)
    assert not torch.equal(plain(later), expected)
    later.set_attn_implementation("stem")
    torch.testing.assert_close(plain(torch.compile(later, fullgraph=True, backend="eager")), expected)
    with pytest.raises(TypeError, match="set_policy"):
        llama.config.stem_attention["dense_below"] = 0


@pytest.mark.newer_host
def test_settings_can_be_written_by_hand(llama):
    llama.config.stem_attention = {"policy": FEW.to_dict(), "dense_below": 0}
    assert density(llama) == LOW
    llama.config.stem_attention = {"dense_below": 0}
    with pytest.raises(Exception, match="set_policy"):
        plain(torch.compile(llama, backend="eager", fullgraph=True))


BAD_POLICIES = ({"policy": "mass", "shre": 4}, "no", 3)


@pytest.mark.parametrize(
    "stored", [{"polcy": "mass"}, {"dense_layers": -1}, "stem", *({"policy": bad} for bad in BAD_POLICIES)], ids=str
)
def test_bad_stored_settings_are_named_at_load_and_later(stored, llama):
    with pytest.raises(ValueError, match="expected"):
        build(transformers.LlamaConfig(**SMALL, stem_attention=stored))
    llama.config.stem_attention = stored
    with pytest.raises(ValueError, match="expected"):
        plain(llama)


@pytest.mark.parametrize("factors", [FACTORS * 10, FACTORS[:2], [row[:3] for row in FACTORS]], ids=["30", "2", "heads"])
def test_factors_of_another_model_are_refused_when_stored_and_at_load(factors, llama, tmp_path):
    policy = replace(BY_MASS, head_factors=factors)
    llama.config.stem_attention = {"policy": policy.to_dict()}
    llama.save_pretrained(tmp_path)
    load = type(llama).from_pretrained
    for step in (
        lambda: hosts.set_policy(llama, policy),
        lambda: load(tmp_path, attn_implementation="stem"),
        lambda: load(tmp_path).set_attn_implementation("stem"),
    ):
        with pytest.raises(ValueError, match="head_factors: expected 3 x 4 of them"):
            step()


@pytest.mark.parametrize("compiled", [False, True])
def test_factors_of_a_deeper_model_are_refused_at_the_call(compiled, llama):
    policy = replace(BY_MASS, head_factors=FACTORS * 10)
    run = torch.compile(llama, backend="eager") if compiled else llama
    with pytest.raises(ValueError, match="head_factors: expected 3 x 4 of them"), hosts.use_policy(policy, dense_below=0):
        plain(run)
    hosts.register(policy, dense_below=0)
    with pytest.raises(ValueError, match="head_factors: expected 3 x 4 of them"):
        plain(run)


def test_set_policy_wants_a_model_on_stem():
    model = small_llama("sdpa")
    with pytest.raises(UnsupportedError, match='LlamaForCausalLM runs attn_implementation="sdpa"'):
        hosts.set_policy(model, KEEP_ALL)
    with pytest.raises(ValueError, match="^model: expected .*, got OptimizedModule; .* pass the one inside"):
        hosts.set_policy(torch.compile(model), KEEP_ALL)


@pytest.mark.parametrize(
    "policies", [[FEW, MORE], [PER_HEAD, replace(PER_HEAD, head_factors=FACTORS[:1])]], ids=["patterns", "factors"]
)
@pytest.mark.newer_host
def test_torch_compile_follows_blocks_and_what_is_stored_in_one_graph(policies, llama):
    async def task(run, policy):
        with use(policy):
            await asyncio.sleep(0)
            return plain(run)

    async def tasks(run):
        return await asyncio.gather(*(task(run, policy) for policy in policies))

    def answers(run):
        found = [logits(run, policy, input_ids=tokens()) for policy in policies] + asyncio.run(tasks(run))
        hosts.set_policy(llama, BY_MASS, dense_below=0)
        return [plain(run), *found]

    found, expected = answers(torch.compile(llama, fullgraph=True, backend="eager")), answers(llama)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair)
    assert all((one - other).abs().max() > 0.01 for i, one in enumerate(found[:3]) for other in found[:i])
