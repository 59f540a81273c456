"""``stem-attention calibrate``: a share for every head of a model, written as a policy."""

from dataclasses import replace
from functools import partial
from typing import Annotated

from torch import Tensor

from stem_attention.calibrate import learn as learning
from stem_attention.cli import options
from stem_attention.cli.errors import UserError, blaming
from stem_attention.cli.job import LONGEST_DEFAULT, open_model, ticking
from stem_attention.cli.system import progress_console
from stem_attention.models.load import context_length
from stem_attention.models.texts import stdlib_text
from stem_attention.policies import Mass


def calibrate(
    out: options.Out,
    model: options.Model = None,
    policy: options.PolicyOption = options.MASS,
    density: Annotated[
        float, options.option("Kept share of the causal block pairs, of all heads together.", "X", min=0.001, max=0.999)
    ] = 0.16,
    length: Annotated[
        int | None,
        options.option("Tokens of a prompt.", shown=f"what the model's context holds, up to {LONGEST_DEFAULT}", min=1),
    ] = None,
    text: options.TextFiles = None,
    windows: Annotated[int, options.option("Windows of each text.", min=1)] = 2,
    haystack: options.Haystack = None,
    needles: Annotated[int, options.option("Prompts that hide numbers.", min=1)] = 8,
    needle_weight: Annotated[
        float,
        options.option("How many tokens of a text a token of an answer is worth; 0 leaves answers out.", "X", min=0, max=1e6),
    ] = learning.NEEDLE_WEIGHT,
    device: options.Device = options.AUTO,
    dtype: options.Dtype = options.AUTO,
    seed: options.Seed = 0,
) -> int:
    """Find out how much each head of a model may drop, from the model's own gradients, and write it as a policy.

    At the same density the policy can then lose less. It is tried on other prompts of the same kinds, and the file holds what
    loses least there: the factors, their square roots, or one share for all heads. Weights stay as they are.
    """
    console = progress_console()
    say = partial(console.print, markup=False, soft_wrap=True)
    start = policy.policy
    if not isinstance(start, Mass) or policy.density is not None:
        raise UserError(f"--policy: expected mass, with fields of its own if you like, got {policy.text}; use --density for @")
    texts = text or [stdlib_text()]
    _, loaded, tokenizer = open_model(model, device, options.torch_dtype(dtype, device), console)
    limit = context_length(loaded)
    if length is None:
        length = min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT)
    elif limit is not None and length > limit:
        raise UserError(f"--length: expected at most {limit}, the model's context, got {length}; lower it")
    with blaming("calibrate: ", tokens="--length", density="--density", text="--text", haystack="--haystack"):
        kinds = [(learning.text_lessons(tokenizer, texts, length, windows), 1.0)]
        if needle_weight:
            kinds.append((learning.needle_lessons(tokenizer, haystack, length, needles, f"calibrate {seed}"), needle_weight))
        lessons = [lesson for kind, _ in kinds for lesson in kind]
        learning.check_density(density, lessons, start)
        others = [learning.other_windows(tokenizer, texts, length, windows)]
        if needle_weight:
            others.append(learning.needle_lessons(tokenizer, haystack, length, needles, f"others {seed}"))
        with ticking(console, "reading backwards", len(lessons)) as tick:
            curves = [(learning.learn(loaded, kind, start, seed, tick), weight) for kind, weight in kinds]
        factors: Tensor = learning.allocate(curves, density) / start.share
        firsts, tried = [kind[0] for kind, _ in kinds], dict[str, tuple[Mass, float]]()
        with ticking(console, "finding the density", None) as tick:
            for name, table in (("the factors", factors), ("their square roots", factors.sqrt()), ("one share", None)):
                own = replace(start, head_factors=None if table is None else tuple(map(tuple, table.tolist())))
                tried[name] = learning.tuned(loaded, firsts, own, density, tick)
    with console.status("trying them on other prompts"):
        rises = [learning.loss_rises(loaded, kind, [each for each, _ in tried.values()]) for kind in others]
    costs = dict[str, float]()
    for name, of_text, *of_answer in zip(tried, *rises, strict=True):
        costs[name] = of_text + needle_weight * sum(of_answer)
        answers = "".join(f", {rise:+.4f} of an answer" for rise in of_answer)
        say(f"other prompts with {name}: loss {of_text:+.4f} nats a token of a text{answers}")
    best = min(costs, key=costs.__getitem__)
    found, kept = tried[best]
    try:
        out.write_text(found.to_json() + "\n", encoding="utf-8")
    except OSError as error:  # after what may have taken hours
        print(found.to_json())
        raise UserError(f"--out: cannot write {out}: {error.strerror}; what belongs there is on standard output") from error
    say(f"wrote {out}: {best}, which loses least there; density {kept:.3f} on these prompts, share {found.share:.3g}")
    return 0
