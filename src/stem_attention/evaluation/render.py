"""Sections as Markdown and as one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from stem_attention.evaluation.measure import Section, Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #1c2430; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #cdd5df; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 3px 10px; text-align: left; border-bottom: 1px solid #e3e8ee; vertical-align: top; }
th { background: #f2f5f8; } td { max-width: 44rem; overflow-wrap: anywhere; }
img { max-width: 100%; margin: 1rem 0; } .note { color: #55606e; }
"""


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown; pictures are links to PNG files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_markdown_table(table) for table in section.tables]
        parts += [f"![{stem}]({stem.replace(' ', '%20')}.png)" for stem, _ in section.figures]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"

    rows = [line(table.columns), "|" + "---|" * len(table.columns), *(line(row) for row in table.rows)]
    return "\n\n".join([f"### {table.title}", *([table.note] if table.note else []), "\n".join(rows)])


def render_html(title: str, sections: Sequence[Section], pictures: Path) -> str:
    """The report as one file.

    Args:
        title: Heading.
        sections: What it says.
        pictures: Directory with the PNG of every figure.
    """
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts.append(f"<style>{_STYLE}</style><body><h1>{html.escape(title)}</h1>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [_html_table(table) for table in section.tables]
        for stem, _ in section.figures:
            data = base64.b64encode((pictures / f"{stem}.png").read_bytes()).decode()
            parts.append(f"<img alt='{html.escape(stem)}' src='data:image/png;base64,{data}'>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _html_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    note = f"<p class='note'>{html.escape(table.note)}</p>" if table.note else ""
    rows = "\n".join([line(table.columns, "th"), *(line(row, "td") for row in table.rows)])
    return f"<h3>{html.escape(table.title)}</h3>{note}<table>{rows}</table>"
