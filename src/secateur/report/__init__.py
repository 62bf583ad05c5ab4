"""Renderers of facts: text for people, JSON for programs."""

from secateur.report.jsonreport import document, error_document
from secateur.report.text import (
    comparison_table,
    exported_text,
    layer_table,
    measurement_table,
    notes_text,
    verdict_text,
)

__all__ = [
    "comparison_table",
    "document",
    "error_document",
    "exported_text",
    "layer_table",
    "measurement_table",
    "notes_text",
    "verdict_text",
]
