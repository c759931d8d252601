"""Plans as pictures, PNG or SVG, from the records that `kimi-jax plan --json` prints.

Several slices: the memory of a device on each in stacked bars, and their chips against their tokens a second. One
slice: its memory, and what is left of it for other batches and contexts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from kimi_jax.plan.refusal import GB
from kimi_jax.plan.report import MEMORY
from sharding.topologies import SHAPES

FORMATS = ("png", "svg")
COLOURS = {
    "experts": "#31688e",
    "attention": "#35b779",
    "embeddings": "#90d743",
    "other weights": "#b8a9c9",
    "vision": "#8c6bb1",
    "draft head": "#20a4a4",
    "cache": "#f9a03f",
    "temporaries": "#d1495b",
    "headroom": "#eeeeee",
}
DARK = ("experts", "vision", "temporaries")  # on which numbers are white
REFUSED, FAINT = "#c1121f", "#777777"
LONGEST = 150  # per cent at which the bar of a refused slice is cut
MARKS = "osD^vP*Xp"
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue (ITU-R BT.709)
SPEED_INCHES = 6.5  # height of chips against tokens a second
NAMED_FROM = 1.08  # times the tokens a second of the last named slice, from which there is room for the next name
NUMBERED = 5  # per cent of a device from which a part's number has room in its bar

Record = Mapping[str, Any]


def save(records: Sequence[Record], path: Path) -> None:
    """Writes the picture of the plans, in the format of the path's suffix. Raises OSError where it cannot."""
    planned = [record for record in records if "error" not in record]
    height = 2.2 + 0.34 * len(records)
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False,
                                "axes.spines.right": False}):  # fmt: skip
        if len(records) == 1:
            figure = Figure(figsize=(11, 6.6), layout="constrained")
            top, bottom = figure.subplots(2, 1, height_ratios=(1, 4))
            _draw_memory(top, records)
            _draw_headroom(bottom, planned[0])
        else:
            figure = Figure(figsize=(14, max(SPEED_INCHES, height)), layout="constrained")
            below = max(0.1, height - SPEED_INCHES)
            axes = figure.subplot_mosaic(
                [["memory", "speed"], ["memory", "."]], width_ratios=(3, 2), height_ratios=(SPEED_INCHES, below)
            )
            _draw_memory(axes["memory"], records)
            _draw_speed(axes["speed"], planned)
        figure.suptitle(_title(planned[0]), fontsize=12, fontweight="bold")
        figure.supxlabel(_source(planned), fontsize=8, color=FAINT)
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=130)


def _title(record: Record) -> str:
    chunk = f", {record['chunk']:,} at a time" if record["phase"] == "prefill" else ""
    job = f"{record['phase']} of {record['batch']:,} x {record['context']:,} tokens{chunk}"
    return f"{record['model']}: {job}".replace("$", r"\$")


def _source(records: Sequence[Record]) -> str:
    found = {name: version for record in records for name, version in record["versions"].items()}
    kinds = {"compiled": "compiled, not run", "arithmetic": "by arithmetic, neither compiled nor run"}
    said = " and ".join(text for kind, text in kinds.items() if any(record["from"] == kind for record in records))
    return ", ".join(f"{name} {version}" for name, version in found.items()) + f": {said}"


def _draw_memory(axes: Axes, records: Sequence[Record]) -> None:
    """Draws a bar for each slice, in per cent of a device's memory."""
    for row, record in enumerate(records):
        if "error" in record:
            _draw_refused(axes, row, record)
            continue
        begin = 0.0
        for name, field in MEMORY:
            share = 100 * record["memory"][field] / record["memory"]["available"]
            axes.barh(row, share, 0.72, begin, color=COLOURS[name], label=name if record is records[0] else None)
            if share >= NUMBERED:
                ink = "white" if name in DARK else "black"
                axes.text(begin + share / 2, row, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=8)
            begin += share
    axes.set_yticks(range(len(records)), [_label(record) for record in records], fontsize=8)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xlim(0, LONGEST if any("error" in record for record in records) else 100)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_xlabel("memory of a device")
    drawn = [name for name, field in MEMORY if field != "draft_head" or any(_drafts(record) for record in records)]
    handles = [matplotlib.patches.Patch(facecolor=COLOURS[name], edgecolor=FAINT, linewidth=0.4, label=name)
               for name in drawn]  # fmt: skip
    axes.legend(handles=handles, ncols=len(drawn), loc="lower left", bbox_to_anchor=(0, 1), frameon=False,
                fontsize=8, columnspacing=1.0, handlelength=1.0)  # fmt: skip


def _drafts(record: Record) -> bool:
    return "error" not in record and record["memory"]["draft_head"] > 0


def _draw_refused(axes: Axes, row: int, record: Record) -> None:
    """Draws what a slice without a plan lacks, in red."""
    if record["needs"] is None:
        axes.text(1, row, record["short"][:90], va="center", color=REFUSED, fontsize=8)
        return
    share = 100 * record["needs"]["bytes"] / record["needs"]["available"]
    axes.barh(row, min(share, LONGEST), 0.72, color=REFUSED)
    axes.text(1, row, f"{share:,.0f} %: {record['short']}", va="center", color="white", fontsize=8)


def _label(record: Record) -> str:
    return str(record["topology"])


def _draw_speed(axes: Axes, records: Sequence[Record]) -> None:
    """Draws chips against tokens a second, with a line through the slices that no smaller or equal one outruns."""
    kinds = list(SHAPES)
    for kind in dict.fromkeys(record["topology"].split(":")[0] for record in records):
        of_kind = [record for record in records if record["topology"].split(":")[0] == kind]
        number = kinds.index(kind)
        for source, filled in (("compiled", True), ("arithmetic", False)):
            points = [record for record in of_kind if record["from"] == source]
            if points:
                colour = f"C{number}"
                axes.scatter(
                    [record["chips"] for record in points],
                    [record["tokens_per_second"] for record in points],
                    marker=MARKS[number], s=46, edgecolors=colour, facecolors=colour if filled else "none",
                    label=f"{kind}, {source}", zorder=3,
                )  # fmt: skip
    best = pareto(records)
    axes.plot(
        [record["chips"] for record in best], [record["tokens_per_second"] for record in best],
        color=FAINT, linewidth=1, drawstyle="steps-post", label="no fewer chips do more", zorder=2,
    )  # fmt: skip
    named = 0.0
    for record in best:
        point = (record["chips"], record["tokens_per_second"])
        if point[1] > NAMED_FROM * named:
            axes.annotate(record["topology"], point, xytext=(-5, 5), textcoords="offset points", ha="right", fontsize=8)
            named = point[1]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.16, 0.12)
    axes.set_xlabel("chips")
    axes.set_ylabel("tokens/s at most")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def pareto(records: Sequence[Record]) -> list[Record]:
    """Returns the plans, by chips, that give more tokens a second than every plan with no more chips."""
    best: list[Record] = []
    for record in sorted(records, key=lambda one: (one["chips"], -one["tokens_per_second"])):
        if not best or record["tokens_per_second"] > best[-1]["tokens_per_second"]:
            best.append(record)
    return best


def _draw_headroom(axes: Axes, record: Record) -> None:
    """Draws what is left of a device for each batch and context, and the largest batches that fit."""
    others, available = record["others"], record["memory"]["available"]
    left = 100 * np.array(others["headroom"]) / available
    least = min(-1.0, max(-100.0, float(left.min())))
    image = axes.pcolormesh(
        np.arange(len(others["batches"]) + 1) - 0.5, np.arange(len(others["contexts"]) + 1) - 0.5, left,
        cmap="RdBu", norm=TwoSlopeNorm(0, least, max(1.0, float(left.max()))), edgecolors="white", linewidth=0.5,
    )  # fmt: skip
    for row, values in enumerate(left):
        for column, value in enumerate(values):
            ink = "white" if np.dot(image.to_rgba(value)[:3], LUMINANCE) < 0.5 else "black"
            size = value * available / 100 / GB
            text = f"{size:,.1f}" if abs(size) < 1000 else f"{size:,.0f}"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    steps = [_place(others["batches"], batch) for batch in others["largest"]]
    rows = np.arange(len(steps) + 1) - 0.5
    axes.stairs(steps, rows, orientation="horizontal", color="black", linewidth=2, baseline=None)
    for row, (step, batch) in enumerate(zip(steps, others["largest"], strict=True)):
        if step < len(others["batches"]) - 0.5:
            axes.text(step + 0.04, row + 0.3, f"{batch:,}", va="center", fontsize=7, fontweight="bold")
    axes.set_xticks(range(len(others["batches"])), [f"{batch:,}" for batch in others["batches"]])
    axes.set_yticks(range(len(others["contexts"])), [f"{context:,}" for context in others["contexts"]])
    axes.set_xlabel("batch; the line is the largest that fits")
    axes.set_ylabel("tokens of context")
    axes.figure.colorbar(image, ax=axes, label="headroom, % of a device; GB in the cells", extend="min")


def _place(batches: Sequence[int], batch: int) -> float:
    """Returns where a batch is on an axis with a cell for each of `batches`: all that fit are left of it."""
    fit = [number for number, one in enumerate(batches) if one <= batch]
    return (fit[-1] if fit else -1) + 0.5
