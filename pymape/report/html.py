"""The page: plain data in, one HTML file without scripts or links out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from pymape.storage.files import atomic_write

__all__ = ["Figure", "Report", "Row", "Section", "Table", "write_report"]


@dataclass(frozen=True)
class Row:
    """One line of a table; kind is "reference" for what the others are held against, "best", or "" for the rest."""

    cells: Sequence[str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first `labels` columns are text and whose others are numbers; its title stands above it."""

    columns: Sequence[str]
    rows: Sequence[Row]
    labels: int = 1
    note: str = ""
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture as SVG markup, with what to see in it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and the tables and pictures below it."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Report:
    """Everything on the page, in reading order: title, lead, key figures, sections, settings, how to repeat it."""

    title: str
    lead: str
    key_figures: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the report as one HTML file that needs no network, no script and no other file.

    Args:
        path: the file to write.
        report: its content; all text is escaped, pictures are inserted as they are.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(_page(report), encoding="utf-8")


def _page(report: Report) -> str:
    tiles = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in report.key_figures.items()
    )
    parts = [
        f"<header><h1>{escape(report.title)}</h1><p class=lead>{escape(report.lead)}</p></header>",
        f"<div class=tiles>{tiles}</div>" if tiles else "",
        *(_section(section) for section in report.sections),
    ]
    if report.settings:
        parts.append(f"<section><h2>Method and settings</h2>{_definitions(report.settings)}</section>")
    if report.command:
        parts.append(
            f"<section><h2>Repeat it</h2><pre><code>{escape(report.command)}</code></pre>"
            f"{_definitions(report.facts)}</section>"
        )
    return _FRAME.format(title=escape(report.title), style=_STYLE, body="\n".join(filter(None, parts)))


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    parts += [_table(table) for table in section.tables]
    parts += [
        f"<figure>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>" for figure in section.figures
    ]
    return f"<section>{''.join(parts)}</section>"


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        row = "".join(
            f"<{tag}{'' if column < table.labels else ' class=n'}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f"<tr{f' class={kind}' if kind else ''}>{row}</tr>"

    marked = "Marked: the best." if any(row.kind == "best" for row in table.rows) else ""
    words = " ".join(filter(None, (marked, table.note)))
    note = f"<p class=note>{escape(words)}</p>" if words else ""
    body = "".join(line(row.cells, "td", row.kind) for row in table.rows)
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    head = line(table.columns, "th")
    return f"{title}<div class=wide><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}"


def _definitions(items: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in items.items())}</dl>"


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root{--ink:#1c2430;--soft:#5c6773;--line:#dfe3e8;--paper:#fff;--panel:#f6f7f9;--mark:#e6f2ec;--accent:#2f6f9f}
@media(prefers-color-scheme:dark){
:root{--ink:#e3e7ec;--soft:#9aa5b1;--line:#343b45;--paper:#14181d;--panel:#1c2229;--mark:#1d3329;--accent:#7fb4dc}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 10px}
h2{font-size:20px;margin:40px 0 8px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:16px;margin:28px 0 0}
p{max-width:88ch;margin:8px 0}
.lead{font-size:18px;color:var(--soft)}
.note,figcaption{font-size:14px;color:var(--soft);max-width:110ch;margin:6px 0 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:24px 0}
.tiles div{background:var(--panel);border-radius:8px;padding:12px 16px}
.tiles b{display:block;font-size:22px;line-height:1.25;color:var(--accent);font-variant-numeric:tabular-nums}
.tiles span{font-size:14px;color:var(--soft)}
.wide{overflow-x:auto;margin:14px 0 4px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 8px;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px;white-space:normal;vertical-align:bottom}
.n{text-align:right}
tr.reference td{color:var(--soft);font-style:italic}
tr.best td{background:var(--mark);font-weight:600}
figure{margin:18px 0}
figure svg{max-width:100%;height:auto;display:block}
dl{display:grid;grid-template-columns:minmax(140px,max-content) 1fr;gap:4px 20px;font-size:15px;margin:12px 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--panel);border-radius:8px;padding:12px 16px;overflow-x:auto;font-size:14px}
@media print{body{font-size:12px}h2{break-after:avoid}figure,table{break-inside:avoid}}
"""
