"""Comparison of an exported file with its model.

The model predicts as in its toolbox, and the file runs in its own runtime.
"""

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import torch

from .preprocessing import ExportError

Arrays = dict[str, np.ndarray]

PIXELS = 0.01
SCORE = 1e-4
MASK = 5e-4
# Factors on the size from the pipeline; the sides are then made odd
SIZES = (1.0, 0.5, 0.2)


class VerificationError(ExportError):
    """A file whose results are not those of the model."""


def verify(
    run: Callable[[np.ndarray, np.ndarray], Arrays],
    module: Any,
    pictures: Sequence[np.ndarray],
    resize: Callable[[np.ndarray], np.ndarray],
) -> str:
    """Compare a file and its model on images, each in three sizes.

    Args:
        run (callable): Runs the file on an image (1, H, W, 3) and its size before
            resizing, and returns arrays by name.
        module (nn.Module): The exportable module.
        pictures (Sequence[ndarray]): RGB, uint8.
        resize (callable): Resizes an image as the pipeline does.

    Returns:
        str: What was compared.

    Raises:
        VerificationError: With the difference and the size.
    """
    counts = []
    for picture in pictures:
        height, width = resize(picture).shape[:2]
        for factor in SIZES:
            shape = int(height * factor) | 1, int(width * factor) | 1
            image = scale_picture(picture, shape)[None]
            size = np.array(picture.shape[:2], dtype=np.int64)
            found, expected = run(image, size), module.predict(image, size)
            problem, count = module.compare(found, expected)
            if problem:
                raise VerificationError(
                    f'{shape[0]}x{shape[1]}: the results of the file and of the model '
                    f'differ: {problem}. Nothing was written.'
                )
            counts.append(f'{shape[0]}x{shape[1]} ({count})')
    text = f'verified against PyTorch: {", ".join(counts)}'
    if all('(0 ' in count for count in counts):
        text += '. Nothing was found: give --verify a picture of the task'
    return text


def scale_picture(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, 3)."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, shape, mode='bilinear', antialias=True)
    return x[0].round().to(torch.uint8).permute(1, 2, 0).numpy()


def draw_picture(shape: tuple[int, int] = (480, 640)) -> np.ndarray:
    """Draw coloured rectangles on noise, if there is no image of the task."""
    rng = np.random.default_rng(0)
    picture = rng.integers(90, 160, (*shape, 3), dtype=np.uint8)
    for _ in range(12):
        y, x = (int(rng.integers(0, side - 40)) for side in shape)
        height, width = (int(rng.integers(20, side // 2)) for side in shape)
        picture[y : y + height, x : x + width] = rng.integers(0, 256, 3)
    return picture


def compare_detections(
    found: Arrays,
    expected: Arrays,
    threshold: float,
    limit: int,
    pixels: float = PIXELS,
    score: float = SCORE,
) -> tuple[str, str]:
    """Compare boxes, scores, labels and masks of an image.

    A detection may be missing on either side if its score is within the tolerance of
    the threshold, or of the lowest score if the limit is reached.

    Args:
        found (dict[str, ndarray]): ``boxes`` (n, 4), ``scores``, ``labels``, and
            ``masks`` (n, H, W) if the model has any.
        expected (dict[str, ndarray]): The same, of the model.
        threshold (float): Lower bound of the scores of detections.
        limit (int): Largest number of detections.
        pixels (float): Tolerance of the sides of boxes. Default: 0.01.
        score (float): Tolerance of scores. Default: 1e-4.

    Returns:
        tuple[str, str]: The difference, empty if there is none, and what was compared.
    """
    pairs = pair(found, expected, pixels, score)
    for own, other, name in ((found, 0, 'more'), (expected, 1, 'less')):
        matched = {p[other] for p in pairs}
        scores = own['scores']
        cut = scores.min() if len(scores) >= limit else threshold
        lost = [i for i in range(len(scores)) if i not in matched]
        lost = [i for i in lost if scores[i] > cut + score]
        if lost:
            first = lost[0]
            return (
                f'{len(lost)} detections {name} of {len(expected["scores"])}, such as '
                f'class {own["labels"][first]} with score {scores[first]:.4f} at '
                f'{np.round(own["boxes"][first], 2).tolist()}'
            ), ''
    worst = 0.0
    for i, j in pairs if 'masks' in expected else ():
        differing = float((found['masks'][i] != expected['masks'][j]).mean())
        worst = max(worst, differing)
    if worst > MASK:
        return f'{worst:.2%} of the pixels of a mask, more than {MASK:.2%}', ''
    return '', f'{len(pairs)} detections'


def pair(
    found: Arrays, expected: Arrays, pixels: float, score: float
) -> list[tuple[int, int]]:
    """Return pairs of indices of detections that are equal up to the tolerances."""
    free, pairs = set(range(len(found['scores']))), []
    for j, box in enumerate(expected['boxes']):
        same = (
            (np.abs(found['boxes'] - box).max(axis=1, initial=0) <= pixels)
            & (np.abs(found['scores'] - expected['scores'][j]) <= score)
            & (found['labels'] == expected['labels'][j])
        )
        candidates = free.intersection(np.flatnonzero(same).tolist())
        if candidates:
            pairs.append((min(candidates), j))
            free.remove(min(candidates))
    return pairs
