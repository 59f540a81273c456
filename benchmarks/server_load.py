"""Load a server with long prompts: time to first token, prompt throughput, and how long answers that stream stall.

    vllm serve MODEL --attention-backend STEM --max-num-batched-tokens 8192 --no-enable-prefix-caching
    python benchmarks/server_load.py --model MODEL --vocab 128256 --length 32768

The server speaks OpenAI's completions and takes token ids: vLLM and SGLang do. Prompts are random, so that no cache knows them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp

SHORT, ANSWER, STREAMED = 600, 16, 256  # tokens of a short prompt, of an answer, and of one that streams beside a long prompt


@dataclass(frozen=True)
class Server:
    """Where to ask, and for which model."""

    session: aiohttp.ClientSession
    url: str
    model: str
    vocab: int

    async def ask(self, length: int, seed: int, tokens: int) -> tuple[float, list[float]]:
        """Send a random prompt. Returns the seconds to the first token, and between the later ones."""
        chosen = random.Random(seed)
        prompt = [chosen.randrange(4, self.vocab) for _ in range(length)]
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "stream": True}
        body |= {"temperature": 0.0, "ignore_eos": True}
        stamps = [time.perf_counter()]
        async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise SystemExit(f"{self.url}: {answer.status} {(await answer.text())[:500]}")
            answers = (line[6:] async for line in answer.content if line.startswith(b"data: {"))
            stamps += [time.perf_counter() async for line in answers if json.loads(line).get("choices")]
        if len(stamps) < 2:
            raise SystemExit(f"{self.url} answered a prompt of {length} tokens with nothing")
        gaps = [later - earlier for earlier, later in pairwise(stamps)]
        return gaps[0], gaps[1:]


async def measure(
    server: Server, length: int, singles: int = 2, requests: int = 8, at_once: int = 4, turns: int = 2
) -> dict[str, Any]:
    """Ask for prompts of a length alone, several at once, and beside three streams. The first prompts are not timed."""
    row: dict[str, Any] = {"length": length}
    for warm, seed in ((length, 1), (SHORT, 2)):
        await server.ask(warm, seed, ANSWER)
    row["ttft_s"] = [round((await server.ask(length, 10 + i, ANSWER))[0], 4) for i in range(singles)]
    if requests:
        gate, begin = asyncio.Semaphore(at_once), time.perf_counter()

        async def one(seed: int) -> float:
            async with gate:
                return (await server.ask(length, seed, ANSWER))[0]

        many = await asyncio.gather(*(one(100 + i) for i in range(requests)))
        seconds = time.perf_counter() - begin
        row |= {"at_once": at_once, "prompt_tokens_per_s": round(requests * length / seconds)}
        row["ttft_of_many_s"] = [round(first, 3) for first in many]
    row["beside_streams"] = [await _beside_streams(server, length, turn) for turn in range(turns)]
    return row


async def _beside_streams(server: Server, length: int, turn: int) -> dict[str, Any]:
    streams = [asyncio.create_task(server.ask(SHORT, 300 + 10 * turn + i, STREAMED)) for i in range(3)]
    await asyncio.sleep(0.7)  # they answer by now
    first, _ = await server.ask(length, 400 + turn, ANSWER)
    gaps = [gaps for _, gaps in await asyncio.gather(*streams)]
    usual = statistics.median(gaps[0])
    steps = [round(1000 * gap, 1) for gap in gaps[0] if gap > 3 * usual]
    longest = round(1000 * max(map(max, gaps)), 1)
    return {"longest_stall_ms": longest, "usual_ms": round(1000 * usual, 2), "ttft_s": round(first, 3), "steps_ms": steps}


async def main() -> None:
    """Print what was measured, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--vocab", type=int, required=True, help="tokens below this number are drawn")
    parser.add_argument("--length", type=int, default=32768, help="tokens of a long prompt")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=4)
    given = parser.parse_args()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600), read_bufsize=2**20) as session:
        server = Server(session, given.url, given.model, given.vocab)
        print(json.dumps(await measure(server, given.length, requests=given.requests, at_once=given.at_once)))


if __name__ == "__main__":
    asyncio.run(main())
