"""The four things of the demo's data set: what they look like.

Each function receives local coordinates ``x``, ``y`` (arrays; the object spans
about -1..1), says which points belong to the object and how they look there.
"""

from dataclasses import dataclass
from typing import Optional

import numpy as np

from .textures import mix, value_noise


@dataclass
class Look:
    """How an object looks, as arrays over its patch.

    Attributes:
        colour (np.ndarray): (H, W, 3) colour without light.
        height (np.ndarray): (H, W) height above the table, in units of the
            object's radius; its slope makes the shading.
        gloss (float): Strength of the highlight.
    """

    colour: np.ndarray
    height: np.ndarray
    gloss: float


class Fruit:
    """One object's random form, drawn once and then asked at any point."""

    name: Optional[str] = None
    WOBBLE = 0.025

    def __init__(self, rng):
        self.seed = int(rng.integers(2**31))
        self.wobble = self.WOBBLE * rng.uniform(-1, 1, (2, 4))

    def radius(self, angle):
        """Outline: distance from the centre (1 = nominal) for each angle."""
        raise NotImplementedError

    def look(self, x, y):
        """Colour and height (Look) at points of the patch."""
        raise NotImplementedError

    def level(self, x, y):
        """0 at the centre, 1 on the outline, more outside."""
        angle = np.arctan2(y, x)
        outline = self.radius(angle)
        for k, (a, b) in enumerate(self.wobble.T, start=2):
            outline = outline + a * np.cos(k * angle) + b * np.sin(k * angle)
        return np.sqrt(x * x + y * y) / outline

    def _dome(self, x, y):
        """Height of a rounded body over this outline."""
        return np.sqrt(np.clip(1 - self.level(x, y) ** 2, 0.02, None))

    def _noise(self, shape, cell):
        return value_noise(np.random.default_rng(self.seed), shape, cell)


class Orange(Fruit):
    """Round, with pores and the star of its stem."""

    name = 'orange'
    WOBBLE = 0.012

    def __init__(self, rng):
        super().__init__(rng)
        self.stem = rng.uniform(-0.5, 0.5, 2)
        self.tone = rng.uniform(0, 1)

    def radius(self, angle):
        return np.full_like(angle, 0.92)

    def look(self, x, y):
        pores = self._noise(x.shape, 1.6)
        stem = np.hypot(x - self.stem[0], y - self.stem[1])
        weight = np.full(x.shape, self.tone) + 0.5 * (pores - 0.5)
        colour = mix((0.90, 0.40, 0.04), (0.98, 0.56, 0.10), weight)
        colour = np.where((stem < 0.11)[..., None], (0.36, 0.40, 0.14), colour)
        return Look(colour, self._dome(x, y) + 0.012 * pores, 0.35)


class Lemon(Fruit):
    """An ellipse with a tip at both ends."""

    name = 'lemon'

    def __init__(self, rng):
        super().__init__(rng)
        self.width = rng.uniform(0.64, 0.74)
        self.green = rng.uniform(0, 0.35)

    def radius(self, angle):
        body = self.width / np.sqrt(
            (self.width * np.cos(angle)) ** 2 / 0.81 + np.sin(angle) ** 2
        )
        tip = np.exp(-((np.sin(angle) / 0.2) ** 2))
        return body + 0.16 * tip * np.where(np.cos(angle) > 0, 1.0, 0.7)

    def look(self, x, y):
        pores = self._noise(x.shape, 2.0)
        ends = np.clip(np.abs(x) - 0.55, 0, 1) * 1.6
        weight = np.clip(self.green + ends + 0.3 * (pores - 0.5), 0, 1)
        colour = mix((0.97, 0.86, 0.16), (0.76, 0.76, 0.16), weight)
        return Look(colour, 0.8 * self._dome(x, y) + 0.012 * pores, 0.3)


class Strawberry(Fruit):
    """A red wedge with seeds and a green crown at its wide end."""

    name = 'strawberry'

    def __init__(self, rng):
        super().__init__(rng)
        self.ripe = rng.uniform(0, 1)
        self.leaves = rng.integers(5, 8)

    def radius(self, angle):
        # The tip points along +x, the crown sits at -x.
        point = np.exp(-((angle / 0.55) ** 2))
        return 0.74 + 0.26 * point - 0.06 * np.cos(2 * angle)

    def look(self, x, y):
        skin = mix(
            (0.66, 0.05, 0.07),
            (0.88, 0.13, 0.10),
            np.clip(self.ripe + 0.5 * (self._noise(x.shape, 4) - 0.5), 0, 1),
        )
        row = np.round(x / 0.26)
        across = y + 0.13 * (row % 2)
        spot = np.hypot(x - 0.26 * row, 0.8 * (across - 0.26 * np.round(across / 0.26)))
        seeds = spot < 0.065
        skin = np.where(seeds[..., None], (0.93, 0.74, 0.32), skin)
        crown = self._crown(x, y)
        green = mix((0.16, 0.36, 0.08), (0.36, 0.58, 0.18), self._noise(x.shape, 3))
        colour = np.where(crown[..., None], green, skin)
        height = self._dome(x, y) - 0.03 * (seeds & ~crown) + 0.06 * crown
        return Look(colour, height, 0.4)

    def _crown(self, x, y):
        from_top = np.hypot(x + 0.72, 0.8 * y)
        around = np.arctan2(y, x + 0.72)
        return from_top < 0.30 + 0.20 * np.cos(self.leaves * around)


class Leaf(Fruit):
    """Flat and pointed, toothed, with a midrib and side veins."""

    name = 'leaf'
    PALETTES = (
        ((0.16, 0.34, 0.10), (0.36, 0.56, 0.20)),
        ((0.24, 0.42, 0.12), (0.52, 0.64, 0.24)),
        ((0.13, 0.30, 0.11), (0.30, 0.48, 0.20)),
    )

    def __init__(self, rng):
        super().__init__(rng)
        self.width = rng.uniform(0.40, 0.56)
        self.bend = rng.uniform(-0.22, 0.22)
        self.teeth = rng.uniform(20, 30)
        self.palette = self.PALETTES[rng.integers(len(self.PALETTES))]

    def _across(self, x, y):
        """Distance from the bent midrib."""
        return y - self.bend * (1 - x * x)

    def level(self, x, y):
        inside = np.clip(1 - x * x, 0, 1)
        half = self.width * inside**0.85 * (1 - 0.25 * x)
        half = half * (1 + 0.06 * np.sin(self.teeth * x))
        stalk = (x < -0.9) & (x > -1.15)
        half = np.maximum(half, np.where(stalk, 0.045, 1e-6))
        return np.abs(self._across(x, y)) / half

    def look(self, x, y):
        across = self._across(x, y)
        side = np.sin(16 * (x - 0.9 * np.abs(across)))
        veins = (np.abs(across) < 0.035) | (side > 0.965)
        patches = self._noise(x.shape, 9)
        colour = mix(*self.palette, np.clip(0.15 + 0.7 * patches, 0, 1))
        colour = np.where(veins[..., None], colour * 0.6 + 0.28, colour)
        ridges = 0.05 * side - 0.35 * np.abs(across) + 0.12 * patches
        return Look(colour, 0.25 + ridges, 0.12)


FRUITS = (Orange, Lemon, Strawberry, Leaf)
