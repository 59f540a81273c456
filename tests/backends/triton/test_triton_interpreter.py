"""The kernels' results without a GPU: a process of its own runs interpreted.py under Triton's interpreter."""

from pathlib import Path

from tests.rigs import under_the_interpreter


def test_kernels_agree_with_the_reference_under_the_interpreter():
    under_the_interpreter(str(Path(__file__).with_name("interpreted.py")))
