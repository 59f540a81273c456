"""Launch choices: tiles, ring depths and programs per multiprocessor, as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Launch:
    """How the kernel runs.

    Attributes:
        tile: Keys per step: a block, half of one or two of them.
        key_slots: Slots of the ring of keys, of ``tile`` keys each.
        value_slots: Slots of the ring of values.
        programs: Programs that share a multiprocessor.
        queries_in_registers: Whether queries move from shared memory to registers once per task.
    """

    tile: int
    key_slots: int
    value_slots: int
    programs: int = 1
    queries_in_registers: bool = False

    def entry_registers(self, block_size: int) -> int:
        """Registers of a thread at entry, so that ``programs`` fit."""
        # A warpgroup for every 64 rows, and one of which a warp copies.
        return 65536 // (128 * (block_size // 64 + 1) * self.programs) // 8 * 8


# By block size and head dimension, measured on an H200.
LAUNCHES = {
    (128, 64): Launch(tile=128, key_slots=4, value_slots=4),
    (128, 128): Launch(tile=128, key_slots=2, value_slots=2),
    (128, 256): Launch(tile=64, key_slots=2, value_slots=2),
    (64, 64): Launch(tile=64, key_slots=4, value_slots=4, programs=3, queries_in_registers=True),
    (64, 128): Launch(tile=128, key_slots=1, value_slots=2, programs=2, queries_in_registers=True),
    (64, 256): Launch(tile=64, key_slots=3, value_slots=3),
}


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU. Meta tensors are launched nowhere: any number will do."""
    return 1 if device.type == "meta" else int(torch.cuda.get_device_properties(device).multi_processor_count)
