"""Block sizes and warps of every launch."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program covers of rows laid out as units."""

    rows: int
    units: int
    warps: int = 4


# Narrow rows share a program, wide rows are split over several: the first tile that holds a row.
TILES = (Tile(128, 8), Tile(16, 64), Tile(1, 1024))

ROUTE_TILE = 128  # entries per program; ranks compare them pairwise
SCAN_BLOCK = 1024  # tiles per step of the scan over tiles
LOGITS_PER_PROGRAM = 2048
DOT_BLOCK = 1024

# Fused multiply-add rounds once where the reference rounds twice.
EXACT = {"enable_fp_fusion": False}

MOST_OUTPUTS = 16  # pointers one launch is given; more outputs are joined first


def tile_for(units: int) -> Tile:
    return next((tile for tile in TILES if tile.units >= units), TILES[-1])
