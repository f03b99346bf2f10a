"""Noise, blur and the surfaces on which the demo's fruit lies.

Everything is computed by NumPy in float64 and rounded once at the end, so that
the pixels are the same on every machine.
"""

import numpy as np


def value_noise(rng, shape, cell):
    """Smooth random field in [0, 1] whose features are ``cell`` pixels large.

    Args:
        rng (np.random.Generator): Source of randomness.
        shape (tuple[int, int]): Height and width in pixels.
        cell (float | tuple[float, float]): Feature size in pixels; two numbers
            (vertical, horizontal) give stretched features.
    """
    cells = np.broadcast_to(np.asarray(cell, np.float64), 2)
    grid = rng.random([int(np.ceil(n / c)) + 2 for n, c in zip(shape, cells)])
    for axis, (length, size) in enumerate(zip(shape, cells)):
        position = np.arange(length) / size
        start = position.astype(int)
        weight = position - start
        weight = weight * weight * (3 - 2 * weight)
        weight = weight[:, None] if axis == 0 else weight[None, :]
        low, high = np.take(grid, start, axis), np.take(grid, start + 1, axis)
        grid = low + (high - low) * weight
    return grid


def fractal_noise(rng, shape, cell, octaves=3):
    """Sum of value noises, each octave half as large and half as strong."""
    cell = np.asarray(cell, np.float64)
    total = np.zeros(shape)
    for octave in range(octaves):
        size = np.maximum(cell / 2**octave, 1)
        total += value_noise(rng, shape, size) / 2**octave
    return total / (2 - 2.0 ** (1 - octaves))


def blur(image, sigma):
    """Gaussian blur of an (H, W) or (H, W, C) array; edges are repeated."""
    radius = max(1, int(np.ceil(2.5 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        length = image.shape[axis]
        padding = [(0, 0)] * image.ndim
        padding[axis] = (radius, radius)
        padded = np.pad(image, padding, mode='edge')
        image = sum(
            tap * np.take(padded, range(i, i + length), axis)
            for i, tap in enumerate(taps)
        )
    return image


def mix(low, high, weight):
    """Colours between ``low`` and ``high`` (RGB) for an (H, W) weight."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return low + (high - low) * weight[..., None]


def _wood(rng, shape):
    """Planks with grain along them and dark gaps between."""
    dark, light = rng.permuted([0, 1])[0], rng.uniform(0.85, 1.1)
    colours = [((0.36, 0.24, 0.15), (0.60, 0.44, 0.29))]
    colours += [((0.50, 0.41, 0.33), (0.74, 0.66, 0.56))]
    low, high = (np.array(c) * light for c in colours[dark])
    plank = rng.uniform(0.28, 0.5) * shape[0]
    row = np.arange(shape[0]) + rng.uniform(0, plank)
    tone = rng.uniform(-0.15, 0.15, 12)[(row // plank).astype(int)]
    gap = np.abs((row % plank) - plank / 2) > plank / 2 - 1
    grain = fractal_noise(rng, shape, (5, 70), 3)
    waves = 0.5 + 0.5 * np.sin(18 * value_noise(rng, shape, (40, 160)) + 6 * grain)
    weight = 0.55 * grain + 0.35 * waves + tone[:, None]
    return mix(low, high, weight) * np.where(gap, 0.45, 1.0)[:, None, None]


def _cloth(rng, shape):
    """A checked cloth with visible threads, on a slant."""
    colours = [(0.42, 0.50, 0.62), (0.45, 0.58, 0.56), (0.55, 0.52, 0.60)]
    colour = np.array(colours[rng.integers(len(colours))])
    angle = rng.uniform(-0.5, 0.5)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    u, v = (t + 4 * value_noise(rng, shape, 50) for t in (u, v))
    period = rng.uniform(24, 44)
    bands = ((u % period) < period / 2) * 0.5 + ((v % period) < period / 2) * 0.5
    threads = 0.5 + 0.25 * np.sin(2.4 * u) + 0.25 * np.sin(2.4 * v)
    folds = fractal_noise(rng, shape, 70, 2)
    cloth = mix((0.86, 0.85, 0.82), colour, bands)
    return cloth * (0.72 + 0.14 * threads + 0.28 * folds)[..., None]


def _stone(rng, shape):
    """Grey or sandy stone with veins and specks."""
    tints = [(1.0, 1.0, 1.03), (1.04, 1.0, 0.92), (0.93, 0.97, 1.02)]
    tint = np.array(tints[rng.integers(len(tints))])
    body = fractal_noise(rng, shape, 60, 5)
    veins = np.abs(fractal_noise(rng, shape, 80, 4) - 0.5)
    specks = rng.random(shape)
    grey = rng.uniform(0.38, 0.62) + 0.3 * (body - 0.5)
    grey = grey + 0.16 * np.exp(-((veins / 0.02) ** 2))
    grey = grey + 0.10 * (specks > 0.97) - 0.10 * (specks < 0.03)
    return grey[..., None] * tint


def _sand(rng, shape):
    """Fine sand with soft ripples."""
    ripples = np.sin(14 * value_noise(rng, shape, (60, 150)))
    grains = rng.random(shape)
    weight = 0.5 + 0.12 * ripples + 0.5 * (grains - 0.5)
    return mix((0.52, 0.44, 0.35), (0.80, 0.73, 0.62), weight)


SURFACES = (_wood, _cloth, _stone, _sand)


def random_surface(rng, shape):
    """Draw one of the surfaces, sometimes turned by a quarter, as (H, W, 3)."""
    paint = SURFACES[rng.integers(len(SURFACES))]
    if rng.random() < 0.5:
        return paint(rng, shape[::-1]).swapaxes(0, 1)
    return paint(rng, shape)
