"""Tile sizes: explicit tables instead of autotuning, so that every run takes the same kernels.

A tile is rows x units; a unit is 1 to 8 bytes of a row that moves, or one number of a row that is
computed with. Each table has one tile per class of row length, the last for all longer rows.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    rows: int
    units: int
    num_warps: int


MOVE = (Tile(128, 8, 4), Tile(32, 64, 4), Tile(4, 512, 4), Tile(1, 2048, 4))
SUM = (Tile(128, 8, 4), Tile(16, 64, 4), Tile(2, 512, 4), Tile(1, 1024, 4))
DOT = (Tile(64, 16, 4), Tile(8, 128, 4), Tile(1, 1024, 4))
SPAN = (Tile(128, 16, 4), Tile(32, 64, 4))  # pixels x channels of one sample
CLASSES = (  # in words of 4 bytes
    *(Tile(32, 8, 4), Tile(8, 32, 4), Tile(4, 128, 4), Tile(2, 512, 4), Tile(1, 1024, 4)),
    *(Tile(1, 2048, 8), Tile(1, 4096, 16)),
)
ARGMAX = (Tile(128, 8, 4), Tile(16, 64, 4))

SPAN_STEPS = 16  # tiles of pixels that one program sums before more programs are asked for
SPAN_PARTS = 64

ROUTE_ENTRIES = 128  # per program; the programs of a later launch read one count per branch of each
ROUTE_BRANCHES = 32  # compared with a tile of entries at a time
ROUTE_SCAN = 1024  # tiles summed at a time
ROUTE_WARPS = 8

MAX_OUTPUTS = 16  # tensors that one kernel reads; more are concatenated first


def tile_for(table: tuple[Tile, ...], units: int) -> Tile:
    """The first tile that holds a row of `units`, or the last."""
    return next((tile for tile in table if tile.units >= units), table[-1])
