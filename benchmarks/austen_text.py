"""Write the six novels of Jane Austen as one UTF-8 text, from the R package in Debian that holds them.

apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen
python benchmarks/austen_text.py austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb austen.txt
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib
from pathlib import Path

_STRINGS = b"\x00\x00\x00\x10"  # how R's serialisation announces a vector of strings


def novels(data: bytes) -> list[str]:
    """The texts in an R data file: one vector of lines per object, in the file's order."""
    texts = []
    while data:
        stream = zlib.decompressobj()
        thing = stream.decompress(data[4:])  # four bytes of length stand before each object
        data = stream.unused_data
        at = thing.index(_STRINGS)
        (count,) = struct.unpack_from(">I", thing, at + 4)
        at, lines = at + 8, []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", thing, at + 4)
            lines.append(thing[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        texts.append("\n".join(lines))
    return texts


def main(source: Path, target: Path) -> None:
    """Convert and say what came out."""
    text = "\n\n".join(novels(source.read_bytes()))
    target.write_text(text, encoding="utf-8")
    print(f"{target}: {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
