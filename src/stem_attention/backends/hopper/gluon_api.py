"""The names of Gluon that differ between the versions of Triton that are supported, and what its language lacks.

Everything else in this folder takes these from here, so that a new Triton is a change of this one file.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.8 gave the copies shorter names, and 3.9 drops the long name of the store.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def pinned(x):
    """``x``, two numbers a thread, computed before whatever waits or synchronises next.

    ptxas moves arithmetic behind a wait for the matrix units that it does not depend on, and then nothing runs beside
    them. A store that never happens (sums of weights are not negative) depends on the arithmetic and stays in place.
    """
    return gl.inline_asm_elementwise(
        """{
            .reg .pred never;
            .reg .b32 nowhere;
            mov.b32 nowhere, 0;
            setp.lt.f32 never, $2, 0f00000000;
            @never st.shared.f32 [nowhere], $2;
            setp.lt.f32 never, $3, 0f00000000;
            @never st.shared.f32 [nowhere], $3;
            mov.b32 $0, $2;
            mov.b32 $1, $3;
        }""",
        "=&r,=&r,r,r",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def barriers(number: gl.constexpr, count: gl.constexpr):
    """Make room for barriers that complete a phase after ``count`` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=count)
    return bars
