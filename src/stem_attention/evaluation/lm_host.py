"""What surrounds lm-eval while it runs a model: its packages, its chatter, and what the host's prefills did meanwhile."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from statistics import fmean
from typing import Any

import tqdm
from transformers import PreTrainedModel

from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.evaluation.measure import Record, What
from stem_attention.evaluation.models import take_stem
from stem_attention.evaluation.prefill import DENSE, SPARSE, AttentionCall, Watcher, wait, watch
from stem_attention.integrations import transformers as stem_host

INSTALL = "pip install 'stem-attention[eval]'"


def need_packages(*packages: str) -> None:
    """Make sure that lm-eval is installed, and what some of its tasks import.

    Raises:
        UnsupportedError: A package is not installed; the message says how to install it.
    """
    absent = [package for package in ("lm_eval", *packages) if importlib.util.find_spec(package) is None]
    if absent:
        raise UnsupportedError(f"the measures ruler and longbench need {', '.join(absent)}; run: {INSTALL}")


def load_task(group: str, name: str, changes: Record) -> Any:
    """One of lm-eval's tasks.

    Args:
        group: The folder of its definition among lm-eval's; others are not searched, which takes seconds.
        name: lm-eval's.
        changes: To its configuration.
    """
    from lm_eval.tasks import TaskManager

    (folder,) = importlib.import_module(f"lm_eval.tasks.{group}").__path__
    manager = TaskManager(include_path=folder, include_defaults=False)
    # lm-eval takes changes to a task that it knows only from a group.
    return manager.load([{"group": "changed", "task": [{"task": name, **changes}]}])["tasks"][name]


class PrefillMeter:
    """What the prefills among a generating model's forward passes did, and how long they took."""

    def __init__(self) -> None:
        self._seconds, self._start = 0.0, 0.0
        self._densities: list[float] = []
        self._sparse = 0

    @contextmanager
    def attached(self, model: PreTrainedModel, what: What, watcher: Watcher) -> Iterator[None]:
        """Prefill ``model`` with ``what``, and report every attention call of a prefill to ``watcher``.

        Raises:
            UnsupportedError: The model's class does not take Stem's attention function.
        """

        def watch_prefill(call: AttentionCall) -> None:
            if call.q.shape[2] > 1:
                watcher(call)

        configured: AbstractContextManager[Any] = nullcontext()
        if what is None:
            model.set_attn_implementation(DENSE)
        else:
            take_stem(model)
            configured = stem_host.configure(what, observer=self._observe)
        hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )
        try:
            with configured, watch(DENSE if what is None else SPARSE, watch_prefill):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def record(self, prompts: int) -> Record:
        """Means over layers and prompts."""
        return {
            "density": fmean(self._densities) if self._densities else 1.0,
            "sparse_share": self._sparse / len(self._densities) if self._densities else 0.0,
            "prefill_seconds": self._seconds / prompts,
        }

    def _observe(self, call: stem_host.LayerCall) -> None:
        if call.q_len > 1:
            self._densities.append(call.density)
            self._sparse += call.sparse

    def _before(self, model: PreTrainedModel, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if options["input_ids"].shape[1] > 1:
            wait(model.device)
            self._start = time.perf_counter()

    def _after(self, model: PreTrainedModel, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if options["input_ids"].shape[1] > 1:
            wait(model.device)
            self._seconds += time.perf_counter() - self._start


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's bars, prints and advice off the terminal, where they would tear the caller's progress bars."""
    bar: Any = tqdm.tqdm
    show, logger = bar.__init__, logging.getLogger("lm_eval")
    level = logger.level

    def hide(self: Any, *args: Any, **options: Any) -> None:
        show(self, *args, **{**options, "disable": True})

    bar.__init__ = hide
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        bar.__init__ = show
        logger.setLevel(level)


def check_tasks(names: Sequence[str], known: Collection[str]) -> None:
    """Check task names before anything is loaded.

    Raises:
        ValueError: One is not among ``known``.
    """
    for name in names:
        if name not in known:
            raise bad_argument("tasks", f"among {', '.join(known)}", repr(name), "pick among these names")
