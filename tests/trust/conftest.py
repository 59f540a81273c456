"""The same promises on every backend: eager ones here, Triton's under its interpreter or on a GPU."""

import pytest

from .common import INTERPRETED, RIGS


@pytest.fixture(params=RIGS)
def rig(request):
    """A backend, and shapes and numbers that suit it."""
    rig = request.param
    if rig.obstacle:
        pytest.skip(rig.obstacle)
    return rig


@pytest.fixture(autouse=True, scope="session")
def _interpreted_kernels_take_cpu_tensors():
    if not INTERPRETED:
        yield
        return
    from stem_attention.backends.triton import TritonBackend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBackend, "supports", lambda self, request: None)
        yield
