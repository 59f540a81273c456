"""Ask a vLLM server that reads prompts sparsely, through the OpenAI client.

    vllm serve MODEL --attention-backend STEM --max-num-batched-tokens 8192     # in another terminal
    python examples/vllm_openai.py [http://localhost:8000/v1]

The client needs `pip install openai` and no GPU. It plants a number in a long text and asks for it. How long that takes is the
server's affair: an 8B model on one H200 reads the prompt in half a second. Without a server it says how to start one.
"""

import sys
import time
from itertools import islice

from stem_attention.models.prompts import haystack_sentences

SENTENCES, SECRET = 250, 4815162
START = "pip install '.[vllm]' openai, then: vllm serve MODEL --attention-backend STEM --max-num-batched-tokens 8192"

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
try:
    from openai import APIConnectionError, OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    model = client.models.list().data[0].id
except ImportError:
    print(f"The client is missing. {START}")
    sys.exit()
except APIConnectionError:
    print(f"No server answers at {url}. {START}")
    sys.exit()

sentences = list(islice(haystack_sentences("vllm"), SENTENCES))
sentences.insert(SENTENCES // 2, f"The secret number is {SECRET}.")
question = " ".join(sentences) + "\n\nWhat is the secret number? Answer with the number alone."

start, first, text = time.perf_counter(), None, ""
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0, stream=True,
    stream_options={"include_usage": True},
)  # fmt: skip
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        first = first or time.perf_counter() - start
        text += chunk.choices[0].delta.content
    tokens = chunk.usage.prompt_tokens if chunk.usage else None
print(f"{model} read {tokens} tokens, first token after {first:.1f} s: {text.strip()!r}")
print("It found the number." if str(SECRET) in text else "It did not find the number.")
print("How much it read sparsely stands in the server's log: look for 'Stem so far'.")
