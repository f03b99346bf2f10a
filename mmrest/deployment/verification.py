"""Comparison of an exported file with its model.

The model predicts as in its toolbox, and the file runs in its own runtime.
"""

import copy
from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import torch

from .preprocessing import ExportError

Arrays = dict[str, np.ndarray]
# In multiples of the tolerance, and a description
Differences = list[tuple[float, str]]

# Tolerances of a side of a box, a score, and the share of the pixels of a mask
PIXELS = 0.01
SCORE = 1e-4
MASK = 5e-4
# Factors on the size from the pipeline; the sides are then made odd
SIZES = (1.0, 0.5, 0.2)
# Copies of the model that show the effect of rounding, and the largest relative
# change of their weights, as of sums of a thousand products in float32
COPIES = 4
CHANGE = 2.0**-18


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
            problem, count = check(run(image, size), module, image, size)
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


def check(
    found: Arrays, module: Any, image: np.ndarray, size: np.ndarray
) -> tuple[str, str]:
    """Compare the results of a file with those of its model on an image.

    Results may differ by the tolerances, or by as much as those of copies of the model
    whose weights are changed by up to 2^-18. This does what the rounding of another CPU
    or runtime does, and more: it moves boxes and scores, and decides where two scores
    or overlaps are equal but for rounding. Copies of a trained detector stay within the
    tolerances. The largest difference may be as large as the largest one of a copy,
    the second one as the second one, and so on.

    Args:
        found (dict[str, ndarray]): Results of the file.
        module (nn.Module): The exportable module.
        image (ndarray): Of shape (1, H, W, 3), RGB, uint8.
        size (ndarray): Height and width of the image before resizing.

    Returns:
        tuple[str, str]: The difference, empty if there is none, and what was compared.
    """
    expected = module.predict(image, size)
    differences, count = module.compare(found, expected)
    if all(value <= 1 for value, _ in differences):
        return '', count
    bounds = np.ones(len(differences))
    for seed in range(COPIES):
        result = change_weights(module, seed).predict(image, size)
        values = [value for value, _ in module.compare(result, expected)[0]]
        values = sorted(values, reverse=True)[: len(bounds)]
        bounds[: len(values)] = np.maximum(bounds[: len(values)], values)
    differences = sorted(differences, key=lambda pair: -pair[0])
    beyond = [
        text
        for (value, text), bound in zip(differences, bounds)
        if not value <= bound  # NaN too
    ]
    if not beyond:
        return '', count
    return f'{len(beyond)} beyond rounding, such as {beyond[0]}, of {count}', ''


def change_weights(module: Any, seed: int) -> Any:
    """Return a copy of an exportable module whose model has slightly other weights."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.model.parameters(), *module.model.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator) * 2 - 1
            tensor.data *= 1 + CHANGE * noise
    return module


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
) -> tuple[Differences, str]:
    """Compare boxes, scores, labels and masks of an image.

    Each detection is paired with the nearest one of its class. A detection may be
    missing on either side if its score is within the tolerance of the threshold, or of
    the lowest score if the limit is reached.

    Args:
        found (dict[str, ndarray]): ``boxes`` (n, 4), ``scores``, ``labels``, and
            ``masks`` (n, H, W) if the model has any.
        expected (dict[str, ndarray]): The same, of the model.
        threshold (float): Lower bound of the scores of detections.
        limit (int): Largest number of detections.
        pixels (float): Tolerance of the sides of boxes. Default: 0.01.
        score (float): Tolerance of scores. Default: 1e-4.

    Returns:
        tuple[list, str]: For each pair the difference, and for each detection without
        a partner infinity; and what was compared.
    """
    boxes = np.abs(found['boxes'][:, None] - expected['boxes']).max(axis=2)
    scores = np.abs(found['scores'][:, None] - expected['scores'])
    distances = np.maximum(boxes / pixels, scores / score)
    is_other = found['labels'][:, None] != expected['labels']
    distances[is_other | np.isnan(distances)] = np.inf
    is_low = []
    for side in (found, expected):
        full = len(side['scores']) >= limit
        cut = side['scores'].min(initial=1) if full else threshold
        is_low.append(side['scores'] <= cut + score)
    rest: list[set[int]] = [set(range(count)) for count in distances.shape]
    differences = []
    while np.isfinite(distances).any():
        i, j = map(int, np.unravel_index(distances.argmin(), distances.shape))
        value, text = distances[i, j], f'box by {boxes[i, j]:.3f} pixel'
        text += f', score by {scores[i, j]:.1e}'
        if 'masks' in expected:
            part = float((found['masks'][i] != expected['masks'][j]).mean())
            value, text = max(value, part / MASK), f'{text}, mask by {part:.2%}'
        distances[i], distances[:, j] = np.inf, np.inf
        for indices, index in zip(rest, (i, j)):
            indices.remove(index)
        if value <= 1 or not (is_low[0][i] and is_low[1][j]):
            differences.append((float(value), f'{describe(expected, j)}: {text}'))
    for side, indices, low, text in zip(
        (found, expected), rest, is_low, ('not of the model', 'missing')
    ):
        lost = [index for index in sorted(indices) if not low[index]]
        differences += [(np.inf, f'{describe(side, i)}: {text}') for i in lost]
    return differences, f'{len(expected["scores"])} detections'


def describe(result: Arrays, index: int) -> str:
    box = np.round(result['boxes'][index], 2).tolist()
    score = result['scores'][index]
    return f'class {result["labels"][index]} with score {score:.4f} at {box}'
