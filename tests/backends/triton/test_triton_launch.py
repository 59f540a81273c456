"""Which launch choice a card gets."""

import json
from importlib.resources import files

import pytest
import torch

pytest.importorskip("triton")

from stem_attention.backends.triton.launch import Launch, architecture, has_tma, launch_for

TABLE = json.loads(files("stem_attention.backends.triton").joinpath("launch.json").read_text())["attention"]
print(__name__, __package__)
