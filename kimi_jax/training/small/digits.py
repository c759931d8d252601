"""Handwritten digits of 8 x 8 grey levels, and pictures of numbers written with them, one digit to a cell of 28 pixels.

The digits are the 1,797 of the UCI Machine Learning Repository's "Optical Recognition of Handwritten Digits", test part
(E. Alpaydin and C. Kaynak, 1998; CC BY 4.0), as scikit-learn distributes them. 360 of them are held out.
"""

import dataclasses
import functools
from importlib import resources

import numpy as np
from PIL import Image

CELL = 28  # pixels of a cell's side, which is one token of the model
HELD_OUT = 360
SHAPES = ((1, 1), (2, 1), (3, 1), (3, 1), (3, 2), (4, 1), (4, 2))  # cells of a canvas, (columns, rows)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Digits by their value: `images[d]` uint8 [n, 8, 8] of ink, 0 to 16."""

    images: tuple[np.ndarray, ...]

    def draw(self, digit: int, random: np.random.Generator) -> np.ndarray:
        """Returns one of the images of `digit`."""
        images = self.images[digit]
        return images[random.integers(len(images))]


@functools.cache
def load(held_out: bool) -> Digits:
    """Returns the held-out digits, or the others, by a fixed permutation."""
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        data = np.load(file)
        images, labels = data["images"], data["labels"]
    order = np.random.RandomState(0).permutation(len(images))
    chosen = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    return Digits(tuple(images[chosen][labels[chosen] == digit] for digit in range(10)))


@dataclasses.dataclass(frozen=True)
class Hand:
    """Says how far drawn digits vary, each value drawn evenly within its bounds.

    size: height in pixels. width: width over height. degrees: of turning. shear. jitter: pixels off the cell's middle.
    wave: pixels by which a smooth field moves the ink. weight: by which strokes are made thicker or thinner. noise: of
    grey levels.
    """

    size: tuple[float, float] = (22.0, 28.0)
    width: tuple[float, float] = (0.85, 1.1)
    degrees: float = 10.0
    shear: float = 0.0
    jitter: float = 2.0
    wave: float = 0.0
    weight: float = 0.0
    noise: float = 0.0


PLAIN = Hand()
VARIED = Hand(
    size=(18.0, 29.0), width=(0.7, 1.2), degrees=15.0, shear=0.25, jitter=3.5, wave=1.6, weight=0.22, noise=0.06
)


def draw_digit(image: np.ndarray, hand: Hand, random: np.random.Generator) -> np.ndarray:
    """Draws an 8 x 8 image into a cell: float32 [28, 28] of ink, 0 to 1."""

    def within(bound: float) -> float:
        return random.uniform(-bound, bound)

    height = random.uniform(*hand.size)
    width = height * random.uniform(*hand.width)
    turn, shear = np.deg2rad(within(hand.degrees)), within(hand.shear)
    shift = np.array([within(hand.jitter), within(hand.jitter)])
    rows, columns = _CELL_GRID - (CELL - 1) / 2 - shift[:, None, None]
    if hand.wave:
        rows = rows + _smooth_field(hand.wave, random)
        columns = columns + _smooth_field(hand.wave, random)
    columns, rows = np.cos(turn) * columns + np.sin(turn) * rows, np.cos(turn) * rows - np.sin(turn) * columns
    columns = columns + shear * rows
    ink = _sample(_enlarged(image), rows * 32 / height + 15.5, columns * 32 / width + 15.5)
    if hand.weight:
        contrast = random.uniform(1.0, 1.6)
        ink = np.where(ink > 0.02, (ink - 0.5) * contrast + 0.5 + within(hand.weight), 0.0)
        ink = np.clip(ink, 0.0, 1.0)
    return ink.astype(np.float32)


_CELL_GRID = np.mgrid[:CELL, :CELL].astype(np.float64)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Returns ink [32, 32], 0 to 1, of an 8 x 8 image enlarged by PIL's bicubic filter."""
    grey = Image.fromarray(image.astype(np.float32) / 16)
    return np.clip(np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC)), 0.0, 1.0)


def _sample(ink: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Samples ink between its pixels, linearly; none outside."""
    padded = np.pad(ink, 1)
    rows, columns = (np.clip(at + 1, 0.0, 32.999) for at in (rows, columns))
    r, c = rows.astype(int), columns.astype(int)
    fr, fc = rows - r, columns - c
    top = padded[r, c] * (1 - fc) + padded[r, c + 1] * fc
    low = padded[r + 1, c] * (1 - fc) + padded[r + 1, c + 1] * fc
    return top * (1 - fr) + low * fr


def _smooth_field(size: float, random: np.random.Generator) -> np.ndarray:
    """Returns a smooth random field [28, 28] of at most about `size`."""
    coarse = random.uniform(-size, size, (4, 4))
    return _SPREAD @ coarse @ _SPREAD.T


def _spread() -> np.ndarray:
    """Returns the matrix [28, 4] that enlarges four values smoothly to 28."""
    at = np.linspace(0, 3, CELL)[:, None] - np.arange(4)
    weights = np.exp(-2.0 * at**2)
    return weights / weights.sum(axis=1, keepdims=True)


_SPREAD = _spread()


def draw_number(text: str, digits: Digits, hand: Hand, random: np.random.Generator) -> np.ndarray:
    """Draws numbers of 1 to 3 digits on a canvas, dark on light: uint8 [height, width, 3], whole cells.

    Each line of `text` is a number, whose digits stand in neighbouring cells of a line.
    """
    lines = text.split("\n")
    longest = max(map(len, lines))
    fitting = [shape for shape in SHAPES if shape[0] >= longest and shape[1] >= len(lines)]
    columns, rows = fitting[random.integers(len(fitting))]
    ink = np.zeros((rows * CELL, columns * CELL), np.float32)
    for line, row in zip(lines, np.sort(random.permutation(rows)[: len(lines)]), strict=True):
        first = int(random.integers(columns - len(line) + 1))
        for column, digit in enumerate(line, start=first):
            cell = draw_digit(digits.draw(int(digit), random), hand, random)
            ink[row * CELL :, column * CELL :][:CELL, :CELL] = cell
    paper, pen = random.uniform(235, 256), random.uniform(0, 50)
    grey = paper + (pen - paper) * ink
    if hand.noise:
        grey = grey + random.normal(0, random.uniform(0, hand.noise) * 255, grey.shape)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
