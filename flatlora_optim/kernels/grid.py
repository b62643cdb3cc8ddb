"""How a weight is cut into blocks."""

from __future__ import annotations

from typing import NamedTuple

from .threads import rows_at_once


class Grid(NamedTuple):
    """How a weight is cut into blocks of whole rows.

    Here, rows always run along dim 0: in a transposed weight, a row belongs to an input.

    Args:
        rows: Size of the whole (unsharded) weight along dim 0.
        row_size: Elements in one such row.
        device_type: Blocks are larger on accelerators.
        first_block: Number of the weight's first block among all blocks of the model.
        first_row: Where the local part of a sharded weight begins in the whole weight.
        columns: Which elements of each row the local part holds.
        group: Rows of each expert, if experts are stored transposed. No block crosses into another.
    """

    rows: int
    row_size: int
    device_type: str
    first_block: int = 0
    first_row: int = 0
    columns: slice = slice(None)
    group: int = 0

    @property
    def rows_per_block(self) -> int:
        rows = rows_at_once(self.row_size, self.device_type)
        if not self.group:
            return rows
        return next(size for size in range(min(rows, self.group), 0, -1) if self.group % size == 0)

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    def spans(self, local_rows: int, blocks: int = 1) -> list[tuple[int, int]]:
        """Cuts local rows ``[0, local_rows)`` at the whole weight's block boundaries.

        Args:
            blocks: How many blocks to keep together.
        """
        spans, lo, rows = [], 0, blocks * self.rows_per_block
        while lo < local_rows:
            hi = min(local_rows, ((lo + self.first_row) // rows + 1) * rows - self.first_row)
            spans.append((lo, hi))
            lo = hi
        return spans
