"""Write the layout that Hugging Face's `kernels` loads: a copy of the library with relative imports and names of its own.

python packaging/hub_kernel.py dist/hub
LOCAL_KERNELS=owner/stem-attention=dist/hub python ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "stem_attention"
LEFT_OUT = (
    "calibrate", "cli", "models", "testing", "integrations/serving", "integrations/sglang", "integrations/vllm",
)  # fmt: skip
KERNEL_VERSION = 1
"""Grows when callers of the kernel have to change."""

OURS = re.compile(r"^(\s*)from stem_attention((?:\.\w+)*) import", re.MULTILINE)
INSTALLED_VERSION = re.compile(r"^try:\n    __version__ = .*?^    __version__ = .*?$", re.MULTILINE | re.DOTALL)
FOR_TRANSFORMERS = '''

def __getattr__(name: str):
    """What needs transformers is imported when it is asked for."""
    if name in ("flash_attn_forward", "supports_flash_attn"):
        from .integrations.transformers import hub as home
    elif name in ("register", "set_policy", "use_policy"):
        from .integrations import transformers as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
'''


def sources() -> dict[str, str]:
    """Text of every file of the kernel, by its path, with imports made relative."""
    texts = {}
    for file in sorted(SOURCE.rglob("*")):
        name = file.relative_to(SOURCE).as_posix()
        if file.suffix in (".py", ".json") and not name.startswith(LEFT_OUT):
            dots = "." * (name.count("/") + 1)
            texts[name] = OURS.sub(lambda found, dots=dots: f"{found[1]}from {dots}{found[2][1:]} import", file.read_text())
    return texts


def build(directory: Path) -> Path:
    """Write the variant `torch-universal` below ``directory/build`` and return its place."""
    texts = sources()
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]
    identity = f"_stem_attention_{digest}"
    # Two versions in one process must not share their operators.
    texts["ops.py"], found = re.subn(
        '^NAMESPACE = "stem_attention"', f'NAMESPACE = "{identity}"', texts["ops.py"], flags=re.MULTILINE
    )
    if found != 1:
        raise SystemExit("stem_attention/ops.py: expected one line that sets NAMESPACE")
    head, found = INSTALLED_VERSION.subn(f'__version__ = "hub-{digest}"', texts["__init__.py"])
    if found != 1:
        raise SystemExit("stem_attention/__init__.py: expected one try block that sets __version__")
    texts["__init__.py"] = head + FOR_TRANSFORMERS
    place = directory / "build" / "torch-universal"
    for name, text in texts.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    metadata = {
        "id": identity, "name": "stem-attention", "version": KERNEL_VERSION, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cpu"},
    }  # fmt: skip
    (place / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write build/torch-universal")
    print(build(parser.parse_args().directory))
