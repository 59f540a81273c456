"""Threads, forks and spawned processes get what one thread gets, to the bit."""

import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from tests.rigs import equal

from stem_attention import Mass, Stem, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.testing import make_qkv, pack

POLICY = Stem(block_size=16, stride=4, tail_blocks=1)
SPARSE = {"policy": POLICY, "dense_below": 0}
SHAPES = [(1, 150, 150, 4, 2, 16), (2, 97, 300, 4, 4, 32), (1, 301, 301, 6, 2, 16), (3, 64, 65, 2, 1, 8)]


def results(shape):
    """Everything that a call gives for one shape, from its seed."""
    torch.set_num_threads(1)
    q, k, v = make_qkv(*shape)
    out, lse = stem_attention(q, k, v, **SPARSE, return_lse=True)
    kept = select_blocks(q, k, v, policy=POLICY)
    packed = stem_attention_varlen(**pack([(q[:1], k[:1], v[:1])]), **SPARSE)
    return [x.clone() for x in (out, lse, kept.indices, kept.counts, packed)]


def test_eight_threads_at_once_get_what_one_gets():
    expected = [results(shape) for shape in SHAPES]
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        return [equal(results(SHAPES[(i + step) % len(SHAPES)]), expected[(i + step) % len(SHAPES)]) for step in range(12)]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(answers) for answers in pool.map(work, range(8)))


def test_threads_may_race_for_the_first_call():
    code = """
import sys, threading
import torch
from stem_attention import stem_attention
from stem_attention.testing import make_qkv
torch.set_num_threads(1)
q, k, v = make_qkv(1, 200, 200, 4, 2, 16)
start, outs = threading.Barrier(6), []
def work():
    start.wait()
    outs.append(stem_attention(q, k, v, policy="mass:block_size=16,key_pool=8", dense_below=0))
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(outs) == 6 and all(torch.equal(out, outs[0]) for out in outs)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_of_a_process_that_has_computed_gets_the_same():
    expected = results(SHAPES[0])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run in here
        os.write(writer, b"same" if equal(results(SHAPES[0]), expected) else b"other")
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert (status, os.read(reader, 10)) == (0, b"same")
    os.close(reader)
    assert equal(results(SHAPES[0]), expected)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_new_process_gets_the_same(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} there")
    q, k, v = make_qkv(*SHAPES[0])
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        out = pool.submit(stem_attention, q, k, v, **SPARSE).result()
    assert torch.equal(out, stem_attention(q, k, v, **SPARSE))


def test_the_compilers_cache_is_where_triton_puts_it_and_no_one_else_may_write_there(tmp_path):
    """Triton loads what lies there as code. Its default is in the user's home; the library never moves or opens it."""
    pytest.importorskip("triton")
    code = """
import os
os.umask(0o022)
import triton
from triton.runtime.cache import get_cache_manager
import stem_attention.backends.triton.attention_kernel
print(get_cache_manager("0" * 64).put("x", "probe"))
"""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**unset, "HOME": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    written = tmp_path / ".triton" / "cache"
    assert ran.stdout.startswith(str(written))
    assert all(not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in (written, *written.rglob("*")))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_threads_on_streams_and_devices_of_their_own_get_the_same():
    """With two GPUs, half of the threads run on the second, nobody's current device. Each policy has tables of its own."""
    count, heads = torch.cuda.device_count(), [[0.5, 2.0, 1.0, 4.0] * 2]
    q, k, v = make_qkv(1, 5000, 5000, 8, 2, 128, torch.bfloat16, "cuda:0")
    expected = stem_attention(q, k, v, policy=Mass(head_factors=heads), dense_below=0).cpu()
    torch.cuda.synchronize()

    def work(i):
        device = torch.device("cuda", i % count)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            moved = [x.to(device) for x in (q, k, v)]
        stream.synchronize()
        with torch.cuda.device(0), torch.cuda.stream(stream):
            policy = Mass(share=4 * (1 + i * 1e-12), head_factors=heads)  # the same numbers in fp32
            out = stem_attention(*moved, policy=policy, dense_below=0)
        stream.synchronize()
        return torch.equal(out.cpu(), expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
