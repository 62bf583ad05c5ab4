"""Patterns: which weights go together.

A new pattern is a file here (fold, unfold, quota) and one line in ``PATTERNS``.
"""

from secateur.pattern.blocks import Blocks, Columns, Kernels, Rows
from secateur.pattern.elements import Elements, PerRow
from secateur.pattern.nm import NM
from secateur.pattern.pattern import Pattern

PATTERNS: dict[str, type[Pattern]] = {
    "elements": Elements,
    "per_row": PerRow,
    "nm": NM,
    "blocks": Blocks,
    "rows": Rows,
    "columns": Columns,
    "kernels": Kernels,
}

__all__ = [
    "NM",
    "PATTERNS",
    "Blocks",
    "Columns",
    "Elements",
    "Kernels",
    "Pattern",
    "PerRow",
    "Rows",
]
