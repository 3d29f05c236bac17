"""HTML that needs no other file: tables, figures as inline PNG, one style."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e5e5e5; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; white-space: normal; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.text td, table.text th { text-align: left; white-space: normal; }
code, pre { font: 13px/1.5 ui-monospace, monospace; }
pre { background: #f6f6f4; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; } .note { color: #666; max-width: 50rem; }
mark { background: #ffe9a8; } .good { color: #2c6e49; } .bad { color: #b3261e; } .failed { color: #b3261e; font-weight: 600; }
"""


def table(head: Iterable[str], body: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of plain texts. kind: a class of STYLE, such as "text" for columns that are no
    numbers."""

    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = [row(head, "th"), *(row(cells, "td") for cells in body)]
    return f'<table class="{kind}">' + "\n".join(rows) + "</table>"


def image(figure, description: str = "") -> str:
    """A matplotlib figure as an <img> that holds its data."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, bbox_inches="tight")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{encoded}">'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def page(title: str, introduction: str, sections: dict[str, str]) -> str:
    """A page. introduction and the sections, heading -> content, are HTML; empty sections are left
    out."""
    parts = [f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections.items() if content]
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{introduction}
{body}
</body></html>
"""
