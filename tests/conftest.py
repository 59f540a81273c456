"""What every test shares."""

import torch
from hypothesis import settings

# The same examples each time, and no deadline on a busy machine.
settings.register_profile("stem", derandomize=True, deadline=None)
settings.load_profile("stem")

# The tensors of a test are small: threads that wait for each other on a busy machine cost ten times what they save
# (tests/backends/test_attention.py on 2 cores shared with 3 other runs: 99 s with two threads, 9 s with one).
torch.set_num_threads(1)
