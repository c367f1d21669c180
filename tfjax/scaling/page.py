# SPDX-License-Identifier: Apache-2.0
"""HTML of the report: its style, tables and inlined figures. Escapes text."""

import base64
import html
from typing import Sequence

_STYLE = """
:root { color-scheme: light; --ink: #1c2126; --soft: #5c666f; --line: #e3e6e8;
  --accent: #31688e; --warn: #a4432f; --good: #2c6e49; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f7; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px;
  letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 10px; }
h3 { font-size: 16px; margin: 28px 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; }
.lead { font-size: 18px; color: var(--soft); max-width: 72ch; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin: 16px 0; }
.law { font: italic 24px/1.9 Georgia, "Times New Roman", serif; }
.law.small { font-size: 17px; line-height: 1.6; }
.law sup { font-size: 0.62em; line-height: 0; }
.open { color: var(--warn); }
.chip { display: inline-block; border-radius: 99px; padding: 1px 11px;
  font-size: 13px; font-weight: 600; color: #fff; background: var(--warn); }
.chip.converged { background: var(--good); }
.facts { display: grid; gap: 12px; margin: 22px 0;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.facts div { background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: 12px 16px; }
.facts b { display: block; font-size: 20px; line-height: 1.3; }
.facts span { color: var(--soft); font-size: 13px; }
figure { margin: 16px 0; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: 18px 18px 12px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 14px; margin-top: 10px;
  max-width: 112ch; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; margin: 16px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; background: #fafbfb; }
tr:last-child td { border-bottom: 0; }
.left th, .left td, td:first-child, th:first-child { text-align: left; }
.lines td { white-space: pre; }
.wrap td { white-space: normal; overflow-wrap: anywhere; }
.wrap td:first-child { white-space: nowrap; vertical-align: top; }
.card .scroll { border: 0; margin: 0; }
.card table { width: auto; min-width: 40%; font-size: 14px; }
.note { color: var(--soft); font-size: 14px; }
@media print { body { background: #fff; }
  figure, .card { break-inside: avoid; } }
"""


def document(title: str, body: str) -> str:
  """A whole page; it loads nothing."""
  return (
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
      f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


def heading(text: str, level: int = 2) -> str:
  return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
  return f"<p{_class(kind)}>{html.escape(text)}</p>"


def facts(items: Sequence[tuple[str, str]]) -> str:
  """(value, label) pairs, side by side."""
  return '<div class="facts">' + "".join(
      f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
      for value, label in items) + "</div>"


def figure(svg: bytes, caption: str, alternative: str) -> str:
  """An SVG as an image, so that its ids stay its own."""
  data = base64.b64encode(svg).decode("ascii")
  return (f'<figure><img alt="{html.escape(alternative)}" '
          f'src="data:image/svg+xml;base64,{data}">'
          f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def table(header: Sequence[str], rows: Sequence[Sequence[str]],
          kind: str = "") -> str:
  """Text cells; the first column is set left, the others right."""
  head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
  body = "".join(
      "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
      + "</tr>" for row in rows)
  head = f"<thead><tr>{head}</tr></thead>" if header else ""
  return (f'<div class="scroll"><table{_class(kind)}>{head}'
          f"<tbody>{body}</tbody></table></div>")


def card(body: str) -> str:
  """A box around HTML made by this module."""
  return f'<div class="card">{body}</div>'


def chip(text: str, kind: str) -> str:
  return f'<span{_class(f"chip {kind}")}>{html.escape(text)}</span>'


def _class(kind: str) -> str:
  return f' class="{html.escape(kind)}"' if kind else ""
