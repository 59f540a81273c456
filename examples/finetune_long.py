"""Fine-tune a small language model on long texts twice, dense and sparse, and say what each cost and what it learnt.

    python examples/finetune_long.py --text novels.txt      # minutes on a GPU
    python examples/finetune_long.py --quick                # a minute on a CPU

Both runs start from the same weights, read the same windows in the same order, and train LoRA adapters if `peft` is installed,
else the attention of the last layers. What a run learnt is the perplexity of windows it has not seen, each read densely and
sparsely: a model that trained one way may be served the other. Draws finetune_long.png.
"""

import argparse
import copy
import json
import logging
import math
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib.figure import Figure

from stem_attention.integrations.transformers import set_policy, use_policy  # importing it registers "stem"
from stem_attention.models.load import find_model, load_model
from stem_attention.models.texts import Text, TokenizedText, stdlib_text

HELD_OUT = 0.2  # of the text, its end
UNFROZEN_LAYERS = 4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory, a GGUF file or a hub id; unless given, the embedded SmolLM2-135M")
parser.add_argument("--text", type=Path, help="a long text; unless given, Python's own longest modules")
parser.add_argument("--policy", help="what sparse attention keeps; unless given, mass")
parser.add_argument("--tokens", type=int, help="tokens of a window")
parser.add_argument("--steps", type=int, help="windows to train on, one a step")
parser.add_argument("--windows", type=int, help="windows to judge by")
parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
parser.add_argument("--seed", type=int, default=0, help="draws the adapters and the order of the windows")
parser.add_argument("--checkpoint", action="store_true", help="compute activations again instead of keeping them")
parser.add_argument("--json", type=Path, help="file for the numbers")
quick = "tiny sizes, on unless there is a GPU"
parser.add_argument("--quick", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available(), help=quick)
args = parser.parse_args()
defaults = {"tokens": 8192, "steps": 100, "windows": 6, "policy": "mass"}
if args.quick:  # blocks so small that a short window has something to drop
    small = "mass:block_size=16,query_pool=4,key_pool=8,local_blocks=1,tail_blocks=1"
    defaults = {"tokens": 384, "steps": 2, "windows": 1, "policy": small}
for name, value in defaults.items():
    setattr(args, name, value if getattr(args, name) is None else getattr(args, name))

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
text = stdlib_text() if args.text is None else Text(args.text.name, args.text.read_text(encoding="utf-8"))
WAYS = ("dense", "sparse")


def fresh():
    """The model as it was before any training, and the weights that will change."""
    torch.manual_seed(args.seed)
    model = copy.deepcopy(untrained)
    for weight in model.parameters():
        weight.requires_grad_(False)
    if find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
        get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=projections))
    else:
        for layer in model.model.layers[-UNFROZEN_LAYERS:]:
            layer.self_attn.requires_grad_(True)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def attend(model, way):
    """Let a model attend densely, or sparsely from the first token on."""
    model.set_attn_implementation("sdpa" if way == "dense" else "stem")
    if way == "sparse":
        # Stored in the model: torch may compute checkpoints again in threads that a use_policy block does not reach.
        set_policy(model, args.policy, dense_below=0)


def loss_of(model, ids):
    """Mean loss of a window's tokens."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def judged(model, windows):
    """Losses of unseen windows, each read both ways."""
    losses = {}
    model.eval()
    with torch.no_grad():
        for way in WAYS:
            attend(model, way)
            losses[way] = [loss_of(model, ids).item() for ids in windows]
    return losses


def train(way, windows, unseen):
    """One run: its losses, what it cost, and the losses of what came out on unseen windows."""
    model, weights = fresh()
    attend(model, way)
    model.train()
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(weights, args.rate)
    losses, seconds = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for ids in windows:
        start = time.perf_counter()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    cost = {"seconds_a_step": statistics.median(seconds[len(seconds) // 5 :]), "peak_gib": peak}
    return {"losses": losses, **cost, "unseen": judged(model, unseen)}


logging.getLogger("transformers").setLevel(logging.ERROR)
untrained, tokenizer = load_model(find_model(args.model), device, torch.float32)
tokenized = TokenizedText(tokenizer, text)
last = tokenized.starts(args.tokens, 1 + args.windows)[-1]
border = int(last * (1 - HELD_OUT))


def window(start):
    """Tokens from here on, a batch of one."""
    return torch.tensor([tokenized.window(start, args.tokens)], device=device)


draw = torch.Generator().manual_seed(args.seed)
seen = [window(start) for start in torch.randint(0, border - args.tokens, (args.steps,), generator=draw).tolist()]
unseen = [window(border + (last - border) * i // max(1, args.windows - 1)) for i in range(args.windows)]

found = {"before": {"unseen": judged(untrained, unseen)}}
densities = []
attend(untrained, "sparse")
with torch.no_grad(), use_policy(observer=lambda call: densities.append(call.density)):
    loss_of(untrained, unseen[0])
for way in WAYS:
    found[way] = train(way, seen, unseen)

print(
    f"{args.steps} steps of {args.tokens} tokens of {text.name}; sparse keeps {statistics.mean(densities):.1%} of the blocks\n"
)


def perplexities(run):
    """Of unseen windows, by how they are read."""
    return [math.exp(statistics.mean(run["unseen"][way])) for way in WAYS]


columns = ("trained", "last losses", "s a step", "GiB at most", "perplexity dense", "sparse")
print(" | ".join(columns))
for way, run in found.items():
    losses, read = run.get("losses", []), [f"{value:.3f}" for value in perplexities(run)]
    mean = f"{statistics.mean(losses[-10:]):.3f}" if losses else "-"
    took = f"{run['seconds_a_step']:.2f}" if losses else "-"
    peak = f"{run['peak_gib']:.1f}" if run.get("peak_gib") else "-"
    cells = ("not" if way == "before" else way, mean, took, peak, *read)
    print(" | ".join(cell.ljust(len(column)) for cell, column in zip(cells, columns, strict=True)))

if args.json is not None:
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    facts = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    about = {"machine": machine, "torch": torch.__version__, "text": text.name, "sha256": text.sha256}
    adapters = "lora" if find_spec("peft") else f"attention of the last {UNFROZEN_LAYERS} layers"
    facts |= {**about, "density": statistics.mean(densities), "trained": adapters}
    args.json.write_text(json.dumps({"facts": facts, **found}, indent=1))

figure = Figure(figsize=(7, 3.5), layout="constrained")
axes = figure.subplots()
for way, colour in zip(WAYS, ("#7d8590", "#1f6feb"), strict=True):
    axes.plot(range(1, args.steps + 1), found[way]["losses"], color=colour, linewidth=1.2, label=way)
axes.set(xlabel="step", ylabel="loss", title=f"{args.tokens} tokens a step")
axes.legend(frameon=False)
figure.savefig("finetune_long.png", dpi=150)
