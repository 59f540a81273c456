"""Keep what a run has found so far on disk: run.json says what is measured, records.jsonl has one finished record a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from stem_attention.errors import bad_argument
from stem_evals.measure import Record

HEADER, RECORDS = "run.json", "records.jsonl"


class Journal:
    """The records of one directory. Made by :func:`open_journal`, or by :func:`read_journal` for reading alone.

    Attributes:
        directory: Where it lies.
        header: What is measured (see :mod:`stem_evals.facts`).
        records: Finished records, oldest first.
        dropped: Whether a half-written last line was found and left out.
    """

    def __init__(self, directory: Path, header: Record, records: list[Record], dropped: bool) -> None:
        self.directory, self.header, self.records, self.dropped = directory, header, records, dropped
        self._done = {key_of(record) for record in records}

    def has(self, measure: str, case: str, contender: str) -> bool:
        """Tell whether there is a record of this measure, case and contender."""
        return (measure, case, contender) in self._done

    def add(self, record: Record) -> None:
        """Append a record; it is on disk when this returns.

        Raises:
            ValueError: It holds NaN or infinity, for which JSON has no words.
        """
        try:
            line = (json.dumps(record, allow_nan=False) + "\n").encode()
        except ValueError as error:
            fix = "look for NaN in the weights, or try another dtype"
            raise bad_argument("record", "finite numbers", "NaN or infinity", fix) from error
        with (self.directory / RECORDS).open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self.records.append(record)
        self._done.add(key_of(record))


def key_of(record: Record) -> tuple[str, str, str]:
    """Describe what tells a record from the others of a run."""
    return record["measure"], record["case"], record["contender"]


def open_journal(directory: Path, header: Record) -> Journal:
    """Start a directory, or go on with one that was made with the same facts.

    Texts and contenders may be added to it, and each invocation adds itself to ``sessions``.

    Args:
        directory: Made if it is not there.
        header: What is going to be measured.

    Raises:
        ValueError: The directory was made with other facts (the message names them) or holds something else.
        OSError: It cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    header = json.loads(json.dumps(header))
    if not (directory / HEADER).exists():
        if (directory / RECORDS).exists():
            raise bad_argument("out", f"a directory with a {HEADER}", f"{directory} without", "choose another directory")
        _write_header(directory, header)
        return Journal(directory, header, [], dropped=False)
    found = read_journal(directory)
    if differing := differences(found.header, header):
        got, fix = f"{directory} with other {'; '.join(differing)}", "choose another directory, or repeat its settings"
        raise bad_argument("out", "a directory made with the same facts", got, fix)
    merged = {
        **header,
        **{part: {**found.header[part], **header[part]} for part in ("texts", "settings")},
        "contenders": merge_contenders(found.header["contenders"], header["contenders"]),
        "sessions": [*found.header["sessions"], *header["sessions"]],
    }
    if found.dropped:
        _cut_last_line(directory / RECORDS)
    _write_header(directory, merged)
    return Journal(directory, merged, found.records, found.dropped)


def read_journal(directory: Path) -> Journal:
    """Read a directory and change nothing in it.

    Raises:
        ValueError: It is no directory of this command, or a line other than the last is damaged.
    """
    try:
        header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = f"{directory}, whose {HEADER} cannot be read ({error})"
        raise bad_argument("out", "a directory made by stem-evals eval", got, "name another directory") from error
    path = directory / RECORDS
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return Journal(directory, header, [_parsed(line, number, path) for number, line in enumerate(lines, 1)], dropped=bool(rest))


def _parsed(line: bytes, number: int, path: Path) -> Record:
    try:
        record: Record = json.loads(line)
    except json.JSONDecodeError as error:
        got = f"a damaged line {number} ({error})"
        raise bad_argument("out", f"one JSON object a line in {path}", got, "remove that line") from error
    return record


def _cut_last_line(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(content.rfind(b"\n") + 1)


def _write_header(directory: Path, header: Record) -> None:
    """Replace it in one step, so that a killed run leaves the old one or the new one."""
    draft = directory / f"{HEADER}.draft"
    draft.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    draft.replace(directory / HEADER)


def merge_contenders(old: Record, new: Record) -> Record:
    """Contenders of two headers by name, each with the lengths of both."""
    merged = dict(old)
    for name, contender in new.items():
        merged[name] = {**contender, "at": {**old.get(name, {}).get("at", {}), **contender["at"]}}
    return merged


def _parts(header: Record) -> Iterator[tuple[str, object]]:
    """Describe what must not change between two runs into the same directory, by name."""
    for part in ("format", "model", "dtype", "device"):
        yield part, header[part]
    for part in ("texts", "settings"):
        for name, value in header[part].items():
            yield f"{part}.{name}", value
    for name, contender in header["contenders"].items():
        for tokens, described in contender["at"].items():
            yield f"contender {name} at {tokens} tokens", described


def differences(old: Record, new: Record) -> list[str]:
    """Describe what two headers say differently about the same things, one text each."""
    before = dict(_parts(old))
    return [f"{name}{_leaf(before[name], value)}" for name, value in _parts(new) if name in before and before[name] != value]


def _leaf(old: object, new: object) -> str:
    """The first place at which two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(name for name in {**old, **new} if old.get(name, "absent") != new.get(name, "absent"))
        return f".{name}{_leaf(old.get(name, 'absent'), new.get(name, 'absent'))}"
    return f" ({old} there, {new} here)"
