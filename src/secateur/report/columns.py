"""Tables that fit the terminal: columns that find no room follow below, beside the same labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table

_UNBOUNDED = 1 << 16


@dataclass(frozen=True)
class Columns:
    """A table that is cut between columns where the terminal is narrower than it.

    Numbers are never broken and labels never left out: a row without its label says nothing.

    Args:
        table: Without a box. A column shrinks to its ``min_width``, or if it may wrap to its
            longest word.
        labels: How many of its columns stand at the left of each part.
        gap: Spaces between columns.

    Example:
        >>> table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        >>> for name in ("", "before", "after"):
        ...     table.add_column(name, no_wrap=True)
        >>> table.add_row("accuracy", "91.32 %", "91.01 %")
        >>> Console(width=20).print(Columns(table))
                  before
        accuracy  91.32 %
                  after
        accuracy  91.01 %
    """

    table: Table
    labels: int = 1
    gap: int = 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        labels, others = self.table.columns[: self.labels], self.table.columns[self.labels :]
        room = options.max_width - sum(self._least(c, console) + self.gap for c in labels)
        for chosen in self._parts(others, room, console):
            yield self._only([*labels, *chosen])

    def _parts(
        self, columns: Sequence[Column], room: int, console: Console
    ) -> Iterator[list[Column]]:
        """As many columns at a time as there is room for, and at least one."""
        part: list[Column] = []
        used = 0
        for column in columns:
            width = self._least(column, console)
            if part and used + width > room:
                yield part
                part, used = [], 0
            part.append(column)
            used += width + self.gap
        yield part

    def _least(self, column: Column, console: Console) -> int:
        wide = console.options.update(width=_UNBOUNDED)
        size = console.measure(self._only([column]), options=wide)
        if column.min_width is not None:
            return min(column.min_width, size.maximum)
        return size.maximum if column.no_wrap else size.minimum

    def _only(self, columns: Sequence[Column]) -> Table:
        """The table with some of its columns."""
        part = Table(
            box=None, pad_edge=False, padding=(0, self.gap, 0, 0), header_style=self.table.header_style
        )  # fmt: skip
        for column in columns:
            part.add_column(
                column.header,
                justify=column.justify,
                overflow=column.overflow,
                no_wrap=column.no_wrap,
                min_width=column.min_width,
            )
        for row, cells in zip(
            self.table.rows, zip(*(c.cells for c in columns), strict=True), strict=True
        ):
            part.add_row(*cells, end_section=row.end_section)
        return part
