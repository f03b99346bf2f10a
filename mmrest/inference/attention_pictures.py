"""Pictures of the attention of a point in an image."""

from pathlib import Path
from typing import Union

import cv2
import numpy as np

from .attention import PointAttention
from .outputs import new_folder, write_picture

MAX_COLUMNS = 6
TILE_SIDE = 320  # longer side of a tile, in pixels


def save_attention(found: PointAttention, out_dir: Union[str, Path]) -> list[Path]:
    """Save a picture per stage, and the arrays.

    Args:
        found (PointAttention): From :func:`.attention.attend`.
        out_dir (str | Path): A new or empty folder.

    Returns:
        list[Path]: ``stage1.png`` to ``stage4.png``, and ``attention.npz`` with the
        arrays of each stage, such as ``stage1_rows``.

    Raises:
        InferenceError: If the folder holds files.
    """
    folder = new_folder(out_dir)
    paths, arrays = [], {}
    for index, stage in enumerate(found.stages):
        paths.append(folder / f'stage{stage.stage}.png')
        write_picture(paths[-1], draw_stage(found, index))
        for name in ('rows', 'gains', 'gates', 'features'):
            if getattr(stage, name) is not None:
                arrays[f'stage{stage.stage}_{name}'] = getattr(stage, name)
    paths.append(folder / 'attention.npz')
    np.savez_compressed(paths[-1], **arrays)
    return paths


def draw_stage(found: PointAttention, index: int) -> np.ndarray:
    """Draw a stage: a tile for each head, then the gates and the features.

    Args:
        found (PointAttention): From :func:`attend`.
        index (int): The stage, counted from 0.

    Returns:
        ndarray: BGR, uint8. The tile of a head is red where the attention of the point
        is above its mean, and blue where it is below. The title shows the smallest and
        the largest entry of the map.
    """
    stage = found.stages[index]
    tiles = []
    for head, row in enumerate(stage.normalised(), 1):
        title = f'stage {stage.stage}, head {head}: {_range(row)}'
        centred = row - row.mean()
        heat = centred / max(np.abs(centred).max(), 1e-12)
        heat = _spread(heat, found, stage.key_stride)
        tiles.append(_tile(found, _colour(found.view, heat), title))
    maps = [('gates (pixel attention)', stage.gates), ('features', stage.features)]
    for title, values in maps:
        if values is not None:
            span = max(float(np.ptp(values)), 1e-12)
            heat = _spread((values - values.min()) / span, found, 4 * 2**index)
            title = f'{title}: {_range(values)}'
            picture = cv2.applyColorMap(_to_uint8(255 * heat), cv2.COLORMAP_VIRIDIS)
            tiles.append(_tile(found, picture, title))
    columns = len(tiles) if len(tiles) <= 4 else min(MAX_COLUMNS, -(-len(tiles) // 2))
    while len(tiles) % columns:
        tiles.append(np.full_like(tiles[0], 255))
    lines = [tiles[n : n + columns] for n in range(0, len(tiles), columns)]
    return np.concatenate([np.concatenate(line, axis=1) for line in lines])


def _range(values: np.ndarray) -> str:
    return f'{values.min():.3g} to {values.max():.3g}'


def _spread(values: np.ndarray, found: PointAttention, side: int) -> np.ndarray:
    """Resize a map, with ``side`` pixels per entry, to the pixels of the view."""
    size = values.shape[1] * side, values.shape[0] * side
    large = cv2.resize(values.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return large[: found.view.shape[0], : found.view.shape[1]]


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def _colour(view: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Overlay a grey image with red for 0 to 1 and blue for 0 to -1."""
    grey = cv2.cvtColor(view, cv2.COLOR_BGR2GRAY)[..., None] * 0.6 + 60.0
    share = 0.9 * np.abs(heat)[..., None]
    colour = np.where(heat[..., None] > 0, (30.0, 30.0, 230.0), (230.0, 90.0, 30.0))
    return _to_uint8(grey * (1 - share) + colour * share)


def _tile(found: PointAttention, picture: np.ndarray, title: str) -> np.ndarray:
    """Resize a picture, and add the point and a title."""
    factor = TILE_SIDE / max(picture.shape[:2])
    size = tuple(max(1, round(side * factor)) for side in picture.shape[1::-1])
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    centre = tuple(int((side + 0.5) * factor) for side in found.point)
    cv2.drawMarker(picture, centre, (0, 0, 0), cv2.MARKER_CROSS, 16, 4)
    cv2.drawMarker(picture, centre, (255, 255, 255), cv2.MARKER_CROSS, 14, 2)
    strip = np.full((24, TILE_SIDE, 3), 255, np.uint8)
    cv2.putText(
        strip, title, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (40, 40, 40), 1,
        cv2.LINE_AA,
    )  # fmt: skip
    right = TILE_SIDE - size[0]
    picture = cv2.copyMakeBorder(
        picture, 0, 4, 0, right, cv2.BORDER_CONSTANT, value=(255, 255, 255)
    )
    tile = np.concatenate([strip, picture])
    return cv2.copyMakeBorder(
        tile, 0, 0, 0, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255)
    )
