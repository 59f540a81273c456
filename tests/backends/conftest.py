"""Triton exists for Linux alone: elsewhere there is nothing to collect of what is written in it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["hopper", "triton"]


def pytest_collection_modifyitems(items):
    """Start with the tests that take minutes, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: "interpreter" not in item.path.name)
