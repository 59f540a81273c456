"""The promises of this folder for the Triton kernels, by Triton's interpreter, which a whole process must choose."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.rigs import under_the_interpreter


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton exists for Linux alone")
def test_the_triton_kernels_keep_every_promise_under_the_interpreter():
    trust = Path(__file__).parent
    said = under_the_interpreter("-m", "not gpu", str(trust), str(trust.with_name("fuzz")), f"--ignore={__file__}")
    assert "passed" in said
