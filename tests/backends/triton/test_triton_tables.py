"""Tables are what they were made of, and made once for each stream, device and arguments; on GPUs: tests/gpu."""

import torch

from stem_attention import Mass
from stem_attention.backends.triton.mass import _head_shares
from stem_attention.backends.triton.tables import device_table, kept_per_stream
from stem_attention.policies import policy_from_json

CPU = torch.device("cpu")


def test_short_rows_are_padded_with_zeros():
    table = device_table([[1, 2, 3], [], [4]], torch.int32, CPU)
    assert table.dtype == torch.int32
    assert table.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert device_table([[0.5, 3]], torch.float32, CPU).tolist() == [[0.5, 3.0]]


def counting():
    """A maker of tables, and what it was called with."""
    made = []

    @kept_per_stream
    def table(device, *args):
        made.append((device, *args))
        return device_table([args], torch.int32, device)

    return table, made


def test_a_table_is_made_once_for_its_device_and_arguments():
    table, made = counting()
    first = table(CPU, 1, 2)
    assert table(CPU, 1, 2) is first
    assert table(CPU, 2, 1).tolist() == [[2, 1]]
    assert table(torch.device("meta"), 1, 2).device.type == "meta"
    assert made == [(CPU, 1, 2), (CPU, 2, 1), (torch.device("meta"), 1, 2)]


def test_tables_that_were_long_not_used_are_forgotten():
    table, made = counting()
    first = table(CPU, -1)
    for i in range(300):
        table(CPU, i)
        assert table(CPU, -1) is first  # in use
    table(CPU, 0)
    assert made.count((CPU, 0)) == 2


def test_head_shares_are_kept_by_what_they_hold():
    policy = Mass(share=3.0, head_factors=[[0.5, 2]])
    table = _head_shares(CPU, policy, 2)
    assert table.dtype == torch.float32
    assert table.tolist() == [[1.5, 6.0]]
    assert _head_shares(CPU, policy_from_json(policy.to_json()), 2) is table
    assert _head_shares(CPU, Mass(share=3.0, head_factors=[[0.5, 4]]), 2).tolist() == [[1.5, 12.0]]
