"""What every test shares."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from _pytest.junitxml import xml_key
from hypothesis import settings
from tests.rigs import interpreted_kernels_take_cpu_tensors, rig
from tests.toys import byte_tokenizer, save, toy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["interpreted_kernels_take_cpu_tensors", "rig"]

# The same examples each time, and no deadline on a busy machine.
settings.register_profile("stem", derandomize=True, deadline=None)
settings.load_profile("stem")

# The tensors of a test are small: threads that wait for each other on a busy machine cost ten times what they save
# (tests/backends/test_attention.py on 2 cores shared with 3 other runs: 99 s with two threads, 9 s with one).
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """``--junitxml FILE`` also says where the tests ran: pytest's own fixture for that is lost under xdist."""
    report = session.config.stash.get(xml_key, None)
    if report is None:
        return
    report.add_global_property("python", platform.python_version())
    report.add_global_property("device", torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine())
    for package in ("stem-attention", "torch", "triton", "transformers"):
        with suppress(PackageNotFoundError):
            report.add_global_property(package, version(package))


class Largest(TorchDispatchMode):
    """Inside, ``seen`` grows to the elements of the largest tensor that any operation makes, views left out."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen = max([self.seen, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.fixture
def largest() -> Largest:
    """To be entered around what is measured."""
    return Largest()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    """Random Llama: 2 layers, 4 query heads, 2 kv heads, 4096 tokens of context."""
    return toy("llama")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Directory of such a model and its tokenizer, as users save theirs."""
    return save(toy("llama", initializer_range=0.02), tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture
def complaint(capsys):
    """Runs a command line that has to fail, and returns the one line that it says."""

    def line_of(main: Any, arguments: list[str], *codes: int) -> str:
        assert main(arguments) in codes
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        (line,) = (line for line in captured.err.splitlines() if line.startswith(("stem-attention: ", "stem-evals: ")))
        return line

    return line_of
