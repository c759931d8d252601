"""Plans as a picture: the memory of a device in stacked bars, and each step's lower bound."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kimi_jax.plan.planner import GIB, Plan, words
from kimi_jax.plan.report import MEMORY

COLOURS = {
    "experts": "#31688e",
    "attention": "#35b779",
    "embeddings": "#90d743",
    "other weights": "#b8a9c9",
    "vision": "#8c6bb1",
    "cache": "#f9a03f",
    "temporaries": "#d1495b",
    "headroom": "#eeeeee",
}
INK, FAINT = "#222222", "#999999"
ROW, TOP, LABEL, MEMORY_WIDTH, GAP, TIME_WIDTH, MARGIN = 58, 110, 250, 640, 60, 300, 24


def save(plans: Sequence[Plan], path: Path) -> None:
    """Writes a PNG with a row for each plan. Raises OSError where it cannot."""
    height = TOP + ROW * len(plans) + 60
    image = Image.new("RGB", (MARGIN + LABEL + MEMORY_WIDTH + GAP + TIME_WIDTH + MARGIN, height), "white")
    pen = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    first = plans[0]
    title = f"{first.model}: {first.job.phase}, batch {first.job.batch}, {first.job.context:,} tokens of context"
    pen.text((MARGIN, 16), title, INK, large)
    _legend(pen, small)
    left, right = MARGIN + LABEL, MARGIN + LABEL + MEMORY_WIDTH + GAP
    most = max(plan.memory.available for plan in plans)
    slowest = max(plan.step.lower_bound_seconds for plan in plans)
    pen.text((left, TOP - 26), "memory of a device", INK, small)
    pen.text((right, TOP - 26), "lower bound of a step's time", INK, small)
    for i, plan in enumerate(plans):
        y = TOP + ROW * i
        pen.text((MARGIN, y + 4), plan.job.topology.name, INK, large)
        pen.text((MARGIN, y + 28), words(plan.job.mesh), FAINT, small)
        _stack(pen, plan, left, y, MEMORY_WIDTH / most)
        width = (TIME_WIDTH - 110) * plan.step.lower_bound_seconds / slowest
        pen.rectangle((right, y + 8, right + width, y + 34), "#5a6f8c")
        bound = f"{plan.step.lower_bound_seconds * 1e3:.2f} ms, {plan.step.bound_by}"
        pen.text((right + width + 8, y + 13), bound, INK, small)
    _axis(pen, small, left, TOP + ROW * len(plans) + 6, most)
    image.save(path, "PNG")


def _stack(pen: ImageDraw.ImageDraw, plan: Plan, left: int, y: int, scale: float) -> None:
    x = float(left)
    for title, field in MEMORY:
        width = getattr(plan.memory, field) * scale
        pen.rectangle((x, y + 8, x + width, y + 34), COLOURS[title])
        x += width
    pen.rectangle((left, y + 8, x, y + 34), outline=FAINT)


def _legend(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
    x = float(MARGIN)
    for title, colour in COLOURS.items():
        pen.rectangle((x, 52, x + 14, 66), colour, FAINT)
        pen.text((x + 20, 51), title, INK, font)
        x += 44 + pen.textlength(title, font)


def _axis(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, left: int, y: int, most: int
) -> None:
    step = next(step for step in (2, 4, 8, 16, 32) if most / GIB / step <= 8)
    pen.line((left, y, left + MEMORY_WIDTH, y), FAINT)
    for mark in range(0, int(most / GIB) + 1, step):
        x = left + mark * GIB * MEMORY_WIDTH / most
        pen.line((x, y, x, y + 5), FAINT)
        pen.text((x - 6, y + 8), f"{mark} GiB" if mark == 0 else f"{mark}", INK, font)
