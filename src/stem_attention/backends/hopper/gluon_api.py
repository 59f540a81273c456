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


def _in_place(numbers: int) -> tuple[str, str]:
    """PTX that multiplies numbers of a thread in place by as many others, unless those of the whole warp are 1.

    A thread's numbers lie in two rows, two of each in turn: it has to look at the factors of the first and the third.
    """
    lines = [
        "{ .reg .pred same;",
        f"setp.eq.f32 same, ${2 * numbers}, 0f3F800000;",
        f"setp.eq.and.f32 same, ${2 * numbers + 2}, 0f3F800000, same;",
        "vote.sync.all.pred same, same, 0xffffffff;",
        "@same bra.uni DONE;",
        *(f"mul.f32 ${i}, ${i}, ${2 * numbers + i};" for i in range(numbers)),
        "DONE: }",
    ]
    return "\n".join(lines), ",".join(["=f"] * numbers + [str(i) for i in range(numbers)] + ["f"] * numbers)


_SCALED: gl.constexpr = gl.constexpr(_in_place(32)[0])
_SCALED_REGISTERS: gl.constexpr = gl.constexpr(_in_place(32)[1])


@gluon.jit
def rescaled(acc, shrink):
    """``acc * shrink``, of the layout of products: a warp whose rows all shrink by 1 skips the multiplications."""
    return gl.inline_asm_elementwise(_SCALED, _SCALED_REGISTERS, [acc, shrink], dtype=gl.float32, is_pure=True, pack=32)


@gluon.jit
def either(a, b):
    """Combine words of bits, for :func:`gl.reduce`."""
    return a | b


@gluon.jit
def lowest_bit(mask):
    """The place of a mask's lowest bit; of 0 there is none."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 turned; brev.b32 turned, $1; bfind.shiftamt.u32 $0, turned; }",
        "=r,r",
        [mask],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def bits_set(mask):
    """How many bits of a mask are set."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [mask], dtype=gl.int32, is_pure=True, pack=1)
