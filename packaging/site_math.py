"""mkdocs draws ```math fences as MathML, which browsers know: no script, no fonts. GitHub draws the same fences by itself."""

import re

from latex2mathml.converter import convert

FENCE = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Replace the fences of a page; a formula that is wider than the screen scrolls by itself."""
    return FENCE.sub(lambda found: f'<div class="formula">{convert(found[1].strip(), display="block")}</div>', markdown)
