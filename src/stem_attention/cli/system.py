"""What the command runs on: versions, devices, the terminal."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console

_FILE_WIDTH = 160

PACKAGES = ("stem-attention", "torch", "triton", "transformers", "gguf", "accelerate", "matplotlib", "typer", "rich")


def output() -> Console:
    """The console for results. Files and pipes get wide lines, so that no table is squeezed."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def progress_console() -> Console:
    """The console for progress: stderr as it is now, whatever is redirected later."""
    return Console(file=sys.stderr, highlight=False)


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def devices() -> list[tuple[torch.device, str]]:
    """Every device that torch can use, and its name."""
    found = [(torch.device("cpu"), f"{cpu_model()}, {torch.get_num_threads()} threads")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else accelerator.type
            found.append((torch.device(accelerator.type, index), str(name)))
    return found
