"""Draws a trace: a bar for each agent over the seconds, the longest chain of steps marked. It needs matplotlib."""

from pathlib import Path

from kimi_jax.agents.timeline import AgentRecord, Timeline

INK, MUTED, STEP, CALL, PATH = "#1f2328", "#6e7781", "#2f6fde", "#b9c0c9", "#d9480f"
WIDTH, ROW, FRAME = 10.0, 0.26, 1.5  # inches: of the picture, of an agent, of titles and axis
MOST_ROWS = 200


def draw(found: Timeline, path: Path, title: str) -> None:
    """Writes the picture as PNG or SVG, as the name's end says.

    Raises ModuleNotFoundError without matplotlib, ValueError for another end, and where there are no agents.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: expected a name that ends in .png or .svg")
    if not found.agents:
        raise ValueError(f"{path}: the trace has no events, so there is nothing to draw")
    critical, agents = set(found.critical_path), list(found.agents.values())
    shown = _shown(agents, critical)
    figure = Figure(figsize=(WIDTH, FRAME + ROW * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, agent in enumerate(shown):
        marked = agent.name in critical
        axes.broken_barh([_bar((agent.begin, agent.end))], (row - 0.06, 0.12), color=PATH if marked else CALL)
        axes.broken_barh([_bar(call) for call in agent.calls], (row - 0.2, 0.4), color=CALL)
        color = PATH if marked else STEP
        axes.broken_barh([_bar(step) for step in agent.steps], (row - 0.34, 0.68), color=color, ec="white", lw=0.4)
    axes.set_yticks(range(len(shown)), [agent.name for agent in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max(agent.end for agent in agents) * 1.01 or 1)
    axes.set_xlabel("seconds", color=MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=0)
    for label, agent in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(PATH if agent.name in critical else INK)
        label.set_parse_math(False)  # a name is no formula
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e6e8eb", lw=0.6)
    axes.set_axisbelow(True)
    hidden = f", {len(agents) - len(shown)} agents not shown" if len(shown) < len(agents) else ""
    steps = sum(len(agent.steps) for agent in agents)
    text = axes.set_title(
        f"{title}: {len(agents)} agents, {steps} steps, {found.critical_steps} in the longest chain{hidden}",
        loc="left",
        fontsize=10,
        color=INK,
    )
    text.set_parse_math(False)
    keys = {"a message of the model": STEP, "the same on the longest chain": PATH, "calls of tools": CALL}
    handles = [Patch(color=color, label=label) for label, color in keys.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _bar(span: tuple[float, float]) -> tuple[float, float]:
    """Returns a span's begin and length."""
    return span[0], span[1] - span[0]


def _shown(agents: list[AgentRecord], critical: set[str]) -> list[AgentRecord]:
    """Returns the agents that get a row: the longest chain's, and the first others."""
    room = MOST_ROWS - len(critical)
    others = {agent.name for agent in [one for one in agents if one.name not in critical][:room]}
    return [agent for agent in agents if agent.name in critical or agent.name in others]
