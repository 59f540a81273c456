"""Counters of the plug-in, told now and then: in the log, and to Prometheus where a server gathers what its workers count."""

import os
import time
from functools import cache
from logging import Logger
from typing import Any

from stem_attention.integrations.serving.counters import COUNTERS

SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Names prometheus_client's folder, without which no process sees what another one counts."""

_SECONDS = 60.0
_METRICS = {
    "causal_blocks": "Block pairs that dense attention would have read in what Stem read, of all heads and layers",
    "kept_blocks": "Those of them that were read; divided by the former, the density",
}
_last = [-_SECONDS]
_told = dict.fromkeys(_METRICS, 0)


def report_now_and_then(logger: Logger) -> None:
    """Report at most once a minute, and not before there is something: reading what the device counts waits for it."""
    now = time.monotonic()
    if COUNTERS.causal_blocks and now - _last[0] >= _SECONDS:
        _last[0] = now
        report(logger)


def report(logger: Logger) -> None:
    """Log the counters of this process, and add what is new to its metrics."""
    logger.info("Stem so far: %s", COUNTERS)
    if not os.environ.get(SHARED_METRICS):  # for an empty one prometheus_client fills the working directory
        return
    try:
        metrics = _metrics()
    except OSError as error:  # a server must not stop for what counts its work
        logger.warning("Prometheus does not hear of Stem: %s; make the folder that %s names", error, SHARED_METRICS)
        return
    for name, metric in metrics.items():
        total = getattr(COUNTERS, name)
        metric.inc(total - _told[name] if total >= _told[name] else total)  # fewer: they were reset meanwhile
        _told[name] = total


@cache
def _metrics() -> dict[str, Any]:
    """Counters, of which Prometheus adds up the workers': each has heads of its own."""
    from prometheus_client import Counter

    return {name: Counter(f"stem_attention_{name}", text) for name, text in _METRICS.items()}
