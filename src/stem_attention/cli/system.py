"""Know the terminal and the machine: consoles, JSON on stdout, versions, devices."""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console


def output() -> Console:
    """Open the console for results, as wide as the terminal; pipes and files get 80 columns, or what COLUMNS says."""
    return Console(highlight=False)


def progress_console() -> Console:
    """Open the console for progress: stderr as it is now, whatever is redirected later; silent where that is closed."""
    return Console(file=sys.stderr, highlight=False, quiet=sys.stderr is None)


def print_json(value: Any) -> None:
    """Print one line of JSON; numbers that JSON cannot hold (NaN, infinities) become null."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None)))


def version(package: str) -> str | None:
    """Look up the installed version of a distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Read the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Look up the name of a device: of a CPU the processor's."""
    return cpu_model() if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def accelerator() -> torch.device | None:
    """Find the kind of accelerator that torch can use here; None without one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def devices() -> dict[torch.device, str]:
    """List every device that torch can use, with its name."""
    found = {torch.device("cpu"): f"{cpu_model()}, {torch.get_num_threads()} threads"}
    if kind := accelerator():
        name_of = getattr(torch.get_device_module(kind), "get_device_name", lambda index: kind.type)
        for index in range(torch.accelerator.device_count()):
            found[torch.device(kind.type, index)] = str(name_of(index))
    return found
