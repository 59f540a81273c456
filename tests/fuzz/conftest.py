"""Runs a property on many problems, and watches memory meanwhile. ``--hypothesis-profile=soak`` runs thousands, see
docs/reliability.md."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.rigs import BACKENDS, INTERPRETED, Rig

from stem_attention.backends.hopper import HEAD_DIMS as HOPPER_DIMS

from .strategies import Problem, Space, problems

# The soak of a backend is cut into parts, so that processes share it: pytest -n 10 --dist loadgroup. On a GPU each shape of
# a kernel is compiled: a part keeps to a few of them, and all parts have them all.
PARTS = {"cpu": 25, "cuda": 10}
settings.register_profile("soak", settings.get_profile("stem"), max_examples=100, print_blob=False)

TINY = Space(
    head_dims=(16, 24), value_dims=(None, 16, 40), groups=(1, 2, 7), block_sizes=(16, 32), dtypes=("float32", "float16"),
    page_sizes=(1, 16, 20), longest=120, work=1 << 11,
)  # fmt: skip


def space_of(rig: Rig, part: int, soaking: bool) -> Space:
    """What a part's problems are drawn from."""
    if rig.device == "cpu":
        return TINY if INTERPRETED else Space(work=1 << (19 if soaking else 18))
    hopper = rig.backend == "hopper"
    dims = tuple(HOPPER_DIMS) if hopper else (128, 80, 64, 256, 96, 16, 40, 192)
    dim = dims[part // 2 % len(dims)]
    others = (HOPPER_DIMS[dim],) if hopper else (None, None, 128)
    return Space(
        head_dims=(dim,),
        value_dims=others,
        groups=((4, 1, 7, 16, 8)[part % 5],),
        block_sizes=(64,) if part % 2 else (128,),
        dtypes=("float16",) if part % 3 == 2 else ("bfloat16",),
        page_sizes=(16, 64) if part // 2 % 2 else (64, 128),
        work=1 << 23,
        presets=True,
    )


@dataclass
class Memory:
    """Bytes of the process, and of live tensors on its GPU, after every fifth problem."""

    allowed: int = 64 << 20
    every: int = 5
    problems: int = 0
    samples: list[tuple[int, int]] = field(default_factory=list)

    def look(self) -> None:
        """After each problem."""
        self.problems += 1
        if self.problems % self.every == 0:
            gc.collect()
            pages, resident = 0, Path("/proc/self/statm")
            if resident.exists():
                getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what is free goes back: it is no growth
                pages = int(resident.read_text().split()[1])
            self.samples.append((pages * 4096, torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0))

    def check(self) -> None:
        """At the end: the last third of the problems is compared with the first."""
        third = len(self.samples) // 3
        for name, sizes in zip(("the process", "tensors on the GPU"), zip(*self.samples, strict=True), strict=False):
            grown = median(sizes[-third:]) - median(sizes[:third]) if third else 0
            assert grown <= self.allowed, f"{name} grew by {grown / 2**20:.0f} MiB in {self.problems} problems: {sizes}"


@dataclass(frozen=True)
class Trials:
    """A backend and the problems that a property is tried on; twice where memory is watched.

    By the second time kernels are compiled and caches full: nothing may grow.
    """

    rig: Rig
    space: Space
    examples: int
    seed: str
    memory: Memory | None = None
    phases: tuple[Phase, ...] = tuple(Phase)

    def __call__(self, holds: Callable[[Problem, Rig], None], packed: bool = False) -> None:
        """Try a property; hypothesis shrinks the problem where it fails."""

        def tried(after: Callable[[], None]) -> None:
            @seed(self.seed)
            @settings(max_examples=self.examples, phases=self.phases, suppress_health_check=list(HealthCheck))
            @given(problems(self.space, packed))
            def solve(problem: Problem) -> None:
                holds(problem, self.rig)
                after()

            solve()

        tried(lambda: None)
        if self.memory is not None:
            tried(self.memory.look)
            self.memory.check()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trials" not in metafunc.fixturenames:
        return
    soaking, places = settings.get_current_profile_name() == "soak", []
    for rig in BACKENDS:
        for part in range(PARTS[rig.device]) if soaking else [1]:
            name, marks = f"{rig.backend}-{part}", [pytest.mark.gpu] if rig.device == "cuda" else []
            if soaking:
                marks.append(pytest.mark.xdist_group(name))
            places.append(pytest.param((rig, part), id=name, marks=marks))
    metafunc.parametrize("trials", places, indirect=True)


@pytest.fixture
def trials(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Trials]:
    """Few problems in the suite, a hundred for each part in a soak; ``--hypothesis-seed`` draws others."""
    rig, part = request.param
    if rig.obstacle:
        pytest.skip(rig.obstacle)
    soaking = settings.get_current_profile_name() == "soak"
    examples = settings.default.max_examples if soaking else 3 if INTERPRETED else 20
    drawn, memory = f"{request.config.getoption('--hypothesis-seed') or 0}:{part}", Memory() if soaking else None
    yield Trials(rig, space_of(rig, part, soaking), examples, drawn, memory)
    if memory is not None:
        record_property("memory", memory.samples)
