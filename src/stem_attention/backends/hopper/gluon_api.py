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


_SCALED_32: gl.constexpr = gl.constexpr(_in_place(32)[0])
_SCALED_32_REGISTERS: gl.constexpr = gl.constexpr(_in_place(32)[1])
_SCALED_64: gl.constexpr = gl.constexpr(_in_place(64)[0])
_SCALED_64_REGISTERS: gl.constexpr = gl.constexpr(_in_place(64)[1])


@gluon.jit
def rescaled(acc, shrink):
    """``acc * shrink``, of the layout of products: a warp whose rows all shrink by 1 skips the multiplications."""
    if acc.shape[1] >= 128:
        acc = gl.inline_asm_elementwise(
            _SCALED_64, _SCALED_64_REGISTERS, [acc, shrink], dtype=gl.float32, is_pure=True, pack=64
        )
    else:
        acc = gl.inline_asm_elementwise(
            _SCALED_32, _SCALED_32_REGISTERS, [acc, shrink], dtype=gl.float32, is_pure=True, pack=32
        )
    return acc


_MOVED: gl.constexpr = gl.constexpr("""{
    .reg .f32 top0, top1, bar0, bar1, other;
    .reg .pred above0, above1, any;
    mul.f32 top0, $4, $8;
    mul.f32 top1, $5, $8;
    add.f32 bar0, $6, 0f41000000;
    add.f32 bar1, $7, 0f41000000;
    mov.f32 $0, $6;
    mov.f32 $1, $7;
    mov.f32 $2, 0f3F800000;
    mov.f32 $3, 0f3F800000;
    setp.gt.f32 above0, top0, bar0;
    setp.gt.or.f32 any, top1, bar1, above0;
    vote.sync.any.pred any, any, 0xffffffff;
    @!any bra.uni DONE;
    shfl.sync.bfly.b32 other, top0, 1, 31, 0xffffffff;
    max.f32 top0, top0, other;
    shfl.sync.bfly.b32 other, top0, 2, 31, 0xffffffff;
    max.f32 top0, top0, other;
    shfl.sync.bfly.b32 other, top1, 1, 31, 0xffffffff;
    max.f32 top1, top1, other;
    shfl.sync.bfly.b32 other, top1, 2, 31, 0xffffffff;
    max.f32 top1, top1, other;
    setp.gt.f32 above0, top0, bar0;
    setp.gt.f32 above1, top1, bar1;
    @above0 mov.f32 $0, top0;
    @above1 mov.f32 $1, top1;
    sub.f32 other, $6, top0;
    @above0 ex2.approx.ftz.f32 $2, other;
    sub.f32 other, $7, top1;
    @above1 ex2.approx.ftz.f32 $3, other;
DONE: }""")


@gluon.jit
def tops_of(scores):
    """The largest of a row's scores that each thread has, ``(rows, 4)``: four threads share a row of products."""
    parts = scores.reshape([scores.shape[0], scores.shape[1] // 8, 4, 2])
    return gl.max(gl.max(parts, 1), 2)


@gluon.jit
def moved(tops, m, scale):
    """``(maximum, what older weights shrink by)`` of rows, from the largest scores that each thread has of them.

    All are ``(rows, 4)``: every thread knows its rows' maximum. It moves only where a weight would be above 2⁸ (``bar``), and a
    warp in which that is nowhere so exchanges nothing.
    """
    return gl.inline_asm_elementwise(
        _MOVED, "=&f,=&f,=&f,=&f,f,f,f,f,f,f", [tops, m, scale], dtype=(gl.float32, gl.float32), is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def along(x, like):
    """``(rows, 4)``, the same in each of a row's numbers, as a tensor of the shape of ``like``."""
    rows: gl.constexpr = like.shape[0]
    eighths: gl.constexpr = like.shape[1] // 8
    layout: gl.constexpr = like.reshape([rows, eighths, 4, 2]).type.layout
    x = gl.convert_layout(x, gl.SliceLayout(2, gl.SliceLayout(1, layout))).expand_dims(2).expand_dims(1)
    return gl.convert_layout(x.broadcast_to([rows, eighths, 4, 2]).reshape(like.shape), like.type.layout)


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
