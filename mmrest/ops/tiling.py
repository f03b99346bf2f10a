"""How many query rows, and how many images, one tile of attention holds."""

import os
from typing import NamedTuple, Optional

import torch

# Bytes of one tile's scores. Four tiles of this size (scores, probabilities and
# their gradients) are alive at once, so on a CPU they should stay within the
# last-level cache; a GPU wants work enough to fill it.
CPU_TILE_BYTES = 4 * 2**20
GPU_TILE_BYTES = 128 * 2**20
# Below this many rows a matrix product loses more speed than the cache gives.
MIN_ROWS = 64


class Tile(NamedTuple):
    """The part of a batch of score maps that is computed at once."""

    images: int
    rows: int


def tile_bytes(device: torch.device) -> int:
    """Bytes that the scores of one tile may take.

    The environment variable ``MMREST_TILE_BYTES`` overrides the default (4 MiB
    on a CPU, 128 MiB elsewhere).

    Raises:
        ValueError: If ``MMREST_TILE_BYTES`` is not a positive integer.
    """
    override = os.environ.get('MMREST_TILE_BYTES')
    if override is None:
        return CPU_TILE_BYTES if device.type == 'cpu' else GPU_TILE_BYTES
    if not override.isdecimal() or int(override) == 0:
        raise ValueError(
            'MMREST_TILE_BYTES must be a positive integer (bytes of one tile of '
            f'attention scores), found {override!r}'
        )
    return int(override)


def choose_tile(
    q: torch.Tensor, num_keys: int, tile_rows: Optional[int] = None
) -> Tile:
    """Choose the tile for queries of shape (B, h, N, d) and ``num_keys`` keys.

    Whole images are taken together while they fit into :func:`tile_bytes`;
    otherwise one image is cut into equal tiles of at least ``MIN_ROWS`` rows.

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        num_keys (int): Number of keys M.
        tile_rows (int, optional): Query rows of a tile, instead of the number
            that follows from the memory budget.

    Raises:
        ValueError: If ``tile_rows`` is not positive.
    """
    batch, heads, num_queries, _ = q.shape
    if tile_rows is not None:
        if tile_rows < 1:
            raise ValueError(f'tile_rows must be at least 1, found {tile_rows}')
        return Tile(images=1, rows=tile_rows)
    row_bytes = max(1, heads * num_keys * max(4, q.element_size()))
    rows = max(MIN_ROWS, tile_bytes(q.device) // row_bytes)
    if rows >= num_queries:
        images = max(1, min(batch, rows // max(1, num_queries)))
        return Tile(images=images, rows=max(1, num_queries))
    num_tiles = -(-num_queries // rows)
    return Tile(images=1, rows=-(-num_queries // num_tiles))
