"""HTML for notebooks: tables without scripts, in the colours of their surroundings, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as text

# Borders and shades are made of the text's own colour, so that light and dark notebooks both look right.
_STYLE = """<style>
.asena{font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:13px;line-height:1.4;overflow-x:auto}
.asena p{margin:0 0 .4em}.asena p b{font-size:1.1em}
.asena table{border-collapse:collapse;margin:.2em 0 .8em}
.asena th,.asena td{text-align:left!important;padding:.25em .7em;border:0;
border-bottom:1px solid color-mix(in srgb,currentColor 18%,transparent);vertical-align:top;max-width:28em;
overflow-wrap:anywhere;white-space:normal!important}
.asena th{font-weight:600;opacity:.75}
.asena td:first-child{font-family:var(--jp-code-font-family,ui-monospace,monospace)}
.asena .more{opacity:.75}
</style>"""


def box(*parts: str) -> str:
    """The parts, which are HTML, as one display."""
    return f'<div class="asena">{_STYLE}{"".join(parts)}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, more: int = 0) -> str:
    """A table of texts; ``more`` says how many rows are not shown."""
    head = "".join(f'<th scope="col">{text(each)}</th>' for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    if not body:
        return ""
    rest = f'<p class="more">… and {more:,} more</p>' if more > 0 else ""
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>{rest}"


__all__ = ["box", "table", "text"]
