"""Noise for smoothing, the same bits on every device, and counts of what a network says of it. Importing it imports numpy alone."""

from certify.smoothing.noise.dispatch import count_rows, noisy_rows
from certify.smoothing.noise.spec import SELECTION, Gauss, Grid, row_table, to_grid
from certify.smoothing.noise.tables import total_variation

__all__ = ["SELECTION", "Gauss", "Grid", "count_rows", "noisy_rows", "row_table", "to_grid", "total_variation"]
