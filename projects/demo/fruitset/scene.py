"""Puts fruit on a surface, lights it and keeps track of what is visible."""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from .fruits import FRUITS
from .textures import blur, fractal_noise, random_surface, value_noise

SUPERSAMPLE = 3  # masks are computed on a grid this many times finer
REACH = 1.25  # no fruit extends further from its centre, in radii


@dataclass
class Thing:
    """An annotated object (or a heap of them) of a scene.

    Attributes:
        label (int): Index into ``FRUITS``.
        mask (np.ndarray): (S*H, S*W) bool, the visible part, S = SUPERSAMPLE.
        crowd (bool): A heap whose members are not told apart.
        full (int): Number of fine pixels before anything covered it.
    """

    label: int
    mask: np.ndarray
    crowd: bool = False
    full: int = 0


@dataclass
class Scene:
    """A rendered picture, (H, W, 3) uint8 RGB, and its objects."""

    image: np.ndarray
    things: list[Thing] = field(default_factory=list)


@dataclass
class _Placement:
    """Where an object lies: centre and radius in pixels, turned by angle."""

    y: float
    x: float
    radius: float
    angle: float


class _Table:
    """The picture while things are put on it, one above the other."""

    def __init__(self, rng, size):
        self.rng = rng
        self.size = size
        self.canvas = random_surface(rng, (size, size))
        direction = rng.uniform(0, 2 * np.pi)
        self.light = np.array([np.cos(direction), np.sin(direction)])  # x, y
        self.slant = rng.uniform(0.5, 0.9)
        self.things = []

    def mask_of(self, fruit, place):
        """Fine mask of a fruit: (S*H, S*W) bool."""
        length = self.size * SUPERSAMPLE
        rows, cols = (
            slice(
                max(0, int((centre - REACH * place.radius) * SUPERSAMPLE)),
                min(length, int((centre + REACH * place.radius) * SUPERSAMPLE) + 1),
            )
            for centre in (place.y, place.x)
        )
        mask = np.zeros((length, length), bool)
        step = (np.arange(length) + 0.5) / SUPERSAMPLE
        x, y = self._local(step[rows], step[cols], place)
        mask[rows, cols] = fruit.level(x, y) <= 1
        return mask

    @staticmethod
    def _local(rows, cols, place):
        dy = (rows[:, None] - place.y) / place.radius
        dx = (cols[None, :] - place.x) / place.radius
        cos, sin = np.cos(place.angle), np.sin(place.angle)
        return dx * cos + dy * sin, dy * cos - dx * sin

    def hides_too_much(self, mask, keep=0.45):
        """Whether the mask would leave less than ``keep`` of something below."""
        return any((t.mask & ~mask).sum() < keep * t.full for t in self.things)

    def put(self, fruit, place, mask):
        """Draw a fruit with its shadow above everything drawn so far."""
        alpha = _coverage(mask)
        self._shadow(alpha, place)
        half = int(np.ceil(REACH * place.radius)) + 1
        rows = slice(max(0, int(place.y) - half), int(place.y) + half)
        cols = slice(max(0, int(place.x) - half), int(place.x) + half)
        centres = np.arange(self.size) + 0.5
        x, y = self._local(centres[rows], centres[cols], place)
        look = fruit.look(x, y)
        colour = self._lit(look, place.radius)
        below = self.canvas[rows, cols]
        below += alpha[rows, cols, None] * (colour - below)
        for thing in self.things:
            thing.mask &= ~mask

    def _shadow(self, alpha, place):
        """Darken the table beside (cast shadow) and around (contact) a fruit."""
        dx, dy = np.round(-self.light * place.radius * 0.3).astype(int)
        reach = max(abs(dx), abs(dy), 1)
        padded = np.pad(alpha, reach)
        rows = slice(reach - dy, reach - dy + self.size)
        cols = slice(reach - dx, reach - dx + self.size)
        shade = 0.55 * blur(padded[rows, cols], max(1.0, 0.14 * place.radius))
        contact = 0.35 * blur(alpha, max(0.8, 0.07 * place.radius))
        self.canvas *= ((1 - shade) * (1 - contact))[..., None]

    def _lit(self, look, radius):
        """Lambert shading with a highlight, from the slope of the height."""
        slope_y, slope_x = np.gradient(look.height * radius)
        norm = np.sqrt(slope_x**2 + slope_y**2 + 1)
        toward = -(slope_x * self.light[0] + slope_y * self.light[1]) / norm
        up = 1 / norm
        cos, sin = np.cos(self.slant), np.sin(self.slant)
        diffuse = np.clip(cos * up + sin * toward, 0, None)
        # Half vector between the light and the viewer straight above.
        half = np.array([sin, cos + 1]) / np.hypot(sin, cos + 1)
        shine = np.clip(half[0] * toward + half[1] * up, 0, 1) ** 40
        return look.colour * (0.38 + 0.72 * diffuse)[..., None] + (
            look.gloss * shine[..., None]
        )


def _coverage(mask):
    """Fraction of every pixel that a fine mask covers, (H, W)."""
    fine = range(SUPERSAMPLE)
    parts = (mask[i::SUPERSAMPLE, j::SUPERSAMPLE] for i in fine for j in fine)
    return sum(part.astype(np.float64) for part in parts) / SUPERSAMPLE**2


def _camera(rng, image):
    """What a camera adds: uneven light, white balance, blur and noise."""
    size = image.shape[0]
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.28 * (x * np.cos(angle) + y * np.sin(angle))
    light = light * (1.06 - 0.35 * (x * x + y * y)) * rng.uniform(0.82, 1.12)
    if rng.random() < 0.3:  # the shadow of something outside the picture
        edge = value_noise(rng, (size, size), size * 0.6) - rng.uniform(0.4, 0.6)
        light = light * (1 - 0.3 / (1 + np.exp(-25 * edge)))
    image = image * light[..., None] * rng.uniform(0.95, 1.05, 3)
    image = blur(image, rng.uniform(0.35, 0.6))
    noise = rng.normal(0, rng.uniform(0.006, 0.02), image.shape)
    return np.round(np.clip(image + noise, 0, 1) * 255).astype(np.uint8)


def _place(rng, size, radius, margin=0.5):
    """A random place; up to ``1 - margin`` of the radius may leave the image."""
    y, x = rng.uniform(margin * radius, size - margin * radius, 2)
    return _Placement(y, x, radius, rng.uniform(0, 2 * np.pi))


def _put_heap(rng, table, label):
    """A heap of small fruit of one kind: annotated as one crowd."""
    size = table.size
    centre = rng.uniform(0.2 * size, 0.8 * size, 2)
    heap = np.zeros((size * SUPERSAMPLE,) * 2, bool)
    for _ in range(rng.integers(9, 15)):
        radius = size * rng.uniform(0.038, 0.05)
        y, x = np.clip(centre + rng.normal(0, 0.065 * size, 2), 0, size - 1)
        place = _Placement(y, x, radius, rng.uniform(0, 2 * np.pi))
        fruit = FRUITS[label](rng)
        mask = table.mask_of(fruit, place)
        table.put(fruit, place, mask)
        heap |= mask
    table.things.append(Thing(label, heap, crowd=True, full=int(heap.sum())))


def render_scene(seed, size=160, crowd: Optional[bool] = None):
    """Render one scene.

    Args:
        seed (int | sequence[int]): Determines the scene completely.
        size (int): Side of the square picture in pixels. Default: 160.
        crowd (bool, optional): Whether to put a heap on the table. Default:
            None, in one scene of eight.

    Returns:
        Scene: The picture and its objects, of which each shows at least 45 %.
    """
    rng = np.random.default_rng(seed)
    table = _Table(rng, size)
    if rng.random() < 0.125 if crowd is None else crowd:
        _put_heap(rng, table, int(rng.integers(len(FRUITS))))
    for _ in range(rng.integers(2, 6)):
        label = int(rng.integers(len(FRUITS)))
        fruit = FRUITS[label](rng)
        for _attempt in range(8):
            place = _place(rng, size, size * rng.uniform(0.10, 0.22))
            mask = table.mask_of(fruit, place)
            if not table.hides_too_much(mask):
                table.put(fruit, place, mask)
                table.things.append(Thing(label, mask, full=int(mask.sum())))
                break
    dust = fractal_noise(rng, (size, size), 3, 2)
    canvas = table.canvas * (1 - 0.08 * dust[..., None])
    return Scene(_camera(rng, canvas), table.things)
