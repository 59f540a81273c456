"""The load of benchmarks/server_load.py, on a server whose answers take a known time."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="comes with vLLM: make test-vllm")
web = pytest.importorskip("aiohttp.web")

PATH = Path(__file__).parents[3] / "benchmarks/server_load.py"
FIRST, STALL = 0.2, 0.5


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("server_load", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "server_load", module)
    spec.loader.exec_module(module)
    return module


def test_times_are_those_of_the_answers(load):
    """A long prompt takes ``FIRST`` seconds alone, and holds the streams beside it up for ``STALL``."""
    until, asked = [0.0], []

    async def complete(request: Any) -> Any:
        body, clock = await request.json(), asyncio.get_running_loop().time
        asked.append((len(body["prompt"]), body["max_tokens"]))
        assert max(body["prompt"]) < 50
        answer = web.StreamResponse()
        await answer.prepare(request)
        if len(body["prompt"]) == 2000:
            until[0] = clock() + STALL
            await asyncio.sleep(FIRST)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(max(0.005, until[0] - clock() if len(body["prompt"]) < 2000 else 0))
            await answer.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def serve() -> dict[str, Any]:
        app = web.Application()
        app.router.add_post("/v1/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as session:
            row = await load.measure(
                load.Server(session, f"http://127.0.0.1:{port}", "m", 50), 2000, requests=4, at_once=2, turns=1
            )
        await runner.cleanup()
        return dict(row)

    row = asyncio.run(serve())
    (beside,) = row["beside_streams"]
    assert min(row["ttft_s"] + row["ttft_of_many_s"]) >= FIRST
    assert 2000 / FIRST < row["prompt_tokens_per_s"] < 2 * 2000 / FIRST, "two at a time"
    assert beside["longest_stall_ms"] >= 0.9 * 1000 * STALL > 3 * beside["usual_ms"]
    assert beside["steps_ms"]
    assert asked.count((load.SHORT, load.STREAMED)) == 3
    assert asked.count((2000, load.ANSWER)) == 1 + 2 + 4 + 1
