"""One self-contained HTML page about a run: what was forgotten, how, how well and at what cost."""

from pymape.report.html import Figure, Report, Row, Section, Table, write_report
from pymape.report.sections import evidence_section, flat_settings, run_facts
from pymape.report.text import aligned

__all__ = [
    "Figure",
    "Report",
    "Row",
    "Section",
    "Table",
    "aligned",
    "evidence_section",
    "flat_settings",
    "run_facts",
    "write_report",
]
