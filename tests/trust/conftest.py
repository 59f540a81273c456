"""The same promises on every backend: eager ones here, Triton's under its interpreter or on a GPU."""

from tests.rigs import interpreted_kernels_take_cpu_tensors, rig

__all__ = ["interpreted_kernels_take_cpu_tensors", "rig"]
