"""Pictures of the report, one fixed colour, marker and place in the legend for each setting, drawn light or dark."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.analysis import statistics
from grpo_jax.analysis.estimates import Estimate
from grpo_jax.tools.report.analysis import Setting, Study, limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# Okabe and Ito's colours without yellow and black: told apart by colour-blind eyes, on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")  # from the eighth setting on, when the colours begin again
INKS = {"light": "#1b1f24", "dark": "#e7ebef"}
PAPERS = {"light": "#ffffff", "dark": "#171c23"}
DPI = 110
MANY = 3  # settings; the bands of more cannot be told apart in one panel
ONE_COLUMN, BOTH_COLUMNS = 3.25, 6.75  # inches
LEGEND_GAP = 0.2  # inches between columns
PANELS = (
    ("policy/entropy", "entropy (nats)"),
    ("completion/length_mean", "completion length (tokens)"),
    ("policy/kl_ref", "KL to the reference (nats)"),
    ("policy/clip_fraction_low", "clipped below (share)"),
    ("policy/clip_fraction_high", "clipped above (share)"),
    ("groups/uninformative", "uninformative groups (share)"),
)


def draw(study: Study, theme: str = "light") -> dict[str, bytes]:
    """Draw the pictures: file name -> PNG. A picture of which nothing was recorded is left out."""
    ink = INKS[theme]
    colours: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink
    )
    colours |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), PAPERS[theme])
    drawn = make_figures(study, colours | {"font.size": 9})
    return {f"{name}.png": saved(figure, "png") for name, figure in drawn.items()}


def draw_for_papers(study: Study) -> dict[str, bytes]:
    """Draw the pictures as vectors for a paper of two columns: file name -> PDF, as wide as one column or as both."""
    # Type 42: a font that journals accept, and text that can be searched.
    drawn = make_figures(study, {"font.size": 7, "lines.linewidth": 1.0, "pdf.fonttype": 42})
    vectors = {}
    for name, figure in drawn.items():
        width, height = figure.get_size_inches()
        wanted = BOTH_COLUMNS if len(figure.axes) > 1 else ONE_COLUMN
        figure.set_size_inches(wanted, height * max(wanted / width, 0.6))
        vectors[f"{name}.pdf"] = saved(figure, "pdf")
    return vectors


def make_figures(study: Study, style: dict[str, Any]) -> dict[str, Figure]:
    """Make the figures by name, those of which something was recorded."""
    import matplotlib.style

    layout = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    drawings: dict[str, Callable[[Study], Figure | None]] = {
        "learning_curves": learning_curves,
        "final": final,
        "cost": cost,
        "training": training,
    }
    # From matplotlib's own defaults, not from the user's matplotlibrc: the same runs give the same pictures everywhere.
    with matplotlib.style.context(["default", layout | style]):
        figures = {name: drawing(study) for name, drawing in drawings.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def saved(figure: Figure, kind: str) -> bytes:
    """Return the figure as a file of a kind, "png" or "pdf"."""
    drawn = io.BytesIO()
    # Without the date, so that the same runs give the same file.
    metadata = {"CreationDate": None} if kind == "pdf" else None
    figure.savefig(drawn, dpi=DPI, format=kind, metadata=metadata)
    return drawn.getvalue()


def style_of(study: Study, setting: Setting) -> dict[str, Any]:
    """Return the setting's own colour, marker and dashes, wherever it is drawn."""
    # By the place in the sweep's list, not by rank: a report on more seeds, or of another metric, keeps the colours.
    i = study.order.index(setting.name)
    cycle, place = divmod(i, len(COLOURS))
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": DASHES[cycle % len(DASHES)]}


def new_figure(*grid: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Make a figure of a grid of panels; size: width and height in inches."""
    # Figure by itself, not pyplot: pyplot keeps every figure it makes and wants a display where a backend for one is set.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*grid, squeeze=False)


def common_curve(setting: Setting, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps_E and values_EN, float64, at the E steps that all N seeds recorded; no steps if one of them has none."""
    # The seeds of a mean stay the same along the curve: where one comes or goes, the mean jumps and nothing was learnt.
    curves = [run.curve(metric) for run in setting.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return np.array(steps), np.array([[curve[step] for curve in curves] for step in steps])


def learning_curves(study: Study) -> Figure:
    """Draw the mean over seeds at each evaluation with its interval: of more than three settings each beside the baseline."""
    if len(study.settings) > MANY:
        return small_multiples(study)
    figure, axes = new_figure(1, 1, size=(9.5, 4.4))
    for setting in order_settings(study):
        draw_curve(axes[0, 0], study, setting, style_of(study, setting))
    axes[0, 0].set(xlabel="step", ylabel=study.metric)
    add_legend(figure)
    return figure


def small_multiples(study: Study) -> Figure:
    """Draw a panel for each setting, with the baseline behind it: five bands over each other tell nothing apart."""
    others = [each for each in order_settings(study) if each is not study.baseline]
    num_columns = min(4, len(others))
    num_rows = -(-len(others) // num_columns)
    figure, axes = new_figure(num_rows, num_columns, size=(9.5, 0.6 + 2.3 * num_rows))
    lowest = min(draw_panel(ax, study, setting) for ax, setting in zip(axes.flat, others, strict=False))
    for ax in axes.flat[len(others) :]:
        ax.set_axis_off()
    for ax in axes.flat[: len(others)]:
        ax.set_ylim(bottom=lowest)
        ax.set_xlabel("step")
    for row in axes:
        row[0].set_ylabel(study.metric)
    add_legend(figure)
    return figure


def draw_panel(ax: Axes, study: Study, setting: Setting) -> float:
    """Draw one setting and the baseline; -> the lowest y that is shown."""
    grey = {"color": "#8c8c8c", "linestyle": "-", "marker": ""}
    draw_curve(ax, study, study.baseline, grey)
    draw_curve(ax, study, setting, style_of(study, setting))
    return ax.get_ylim()[0]


def draw_curve(ax: Axes, study: Study, setting: Setting, look: dict[str, Any]) -> None:
    """Draw a setting's mean over seeds and its interval."""
    lowest, highest = limits(study.metric)
    steps_E, values_EN = common_curve(setting, study.metric)
    mean_E, low_E, high_E = statistics.mean_interval(values_EN)
    ax.plot(steps_E, mean_E, **look, markersize=4, linewidth=1.5, label=setting.name)
    interval = np.maximum(low_E, lowest), np.minimum(high_E, highest)
    ax.fill_between(steps_E, *interval, color=look["color"], alpha=0.15, linewidth=0)
    for edge_E in interval:
        ax.plot(steps_E, edge_E, color=look["color"], alpha=0.5, linewidth=0.6)


def final(study: Study) -> Figure:
    """Draw every seed as a dot, mean and interval as a bar: of the final value, and of the difference to the baseline."""
    figure, axes = new_figure(1, 2, size=(9.5, 1.2 + 0.45 * len(study.settings)))
    left, right = axes[0]
    differences = {each.ours.name: each.result for each in study.comparisons}
    base = {run.seed: value for run, value in zip(study.baseline.runs, study.baseline.final_N, strict=True)}
    for row, setting in enumerate(study.settings):
        look = style_of(study, setting) | {"linestyle": ""}
        seeds = [run.seed for run in setting.runs]
        draw_dots(left, row, setting.final_N, setting.mean, look)
        found = differences.get(setting.name)
        if found:
            gaps = [value - base[seed] for seed, value in zip(seeds, setting.final_N, strict=True) if seed in base]
            draw_dots(right, row, np.array(gaps), found.difference, look)
    names = [setting.name for setting in study.settings]
    for ax, label, ticks in ((left, study.metric, names), (right, f"minus {study.baseline.name}, seed by seed", [])):
        # Upside down, so that the best setting is at the top, as in the table. Both panels have the same rows, named once.
        ax.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), ticks)
    right.axvline(0, color="#8c8c8c", linewidth=1)
    return figure


def draw_dots(ax: Axes, row: int, values_N: np.ndarray, mean: Estimate, look: dict[str, Any]) -> None:
    """Draw seeds below their mean and interval, a little apart so that ties are seen.

    Args:
      ax: panel to draw in.
      row: height of the setting.
      values_N: float64 [N], a number for each seed.
      mean: of them, with its interval; the ends are NaN for one seed.
      look: colour and marker of the setting.
    """
    spread = np.array([0.2])
    if len(values_N) > 1:
        spread = np.linspace(0.08, 0.32, len(values_N))
    ax.plot(values_N, row + spread, **look, markersize=4, alpha=0.6)
    if np.isfinite(mean.low):
        ax.plot([mean.low, mean.high], [row - 0.12] * 2, color=look["color"], linewidth=2)
    ax.plot(mean.value, row - 0.12, **look, markersize=7)


def cost(study: Study) -> Figure:
    """Draw the mean learning curve over what it cost so far, in tokens and in seconds."""
    figure, axes = new_figure(1, 2, size=(9.5, 3.6))
    columns = (("million completion tokens sampled", 1e-6), ("seconds in steps", 1.0))
    for which, (ax, (label, scale)) in enumerate(zip(axes[0], columns, strict=True)):
        for setting in order_settings(study):
            steps_E, values_EN = common_curve(setting, study.metric)
            # Seeds reach a step at different costs. Both axes are means over seeds at equal steps, so every point of the curve
            # is of all seeds; means at equal cost would need values between the evaluations.
            cost_EN = np.array([[run.cost[step][which] for run in setting.runs] for step in steps_E])
            look = style_of(study, setting)
            ax.plot(scale * cost_EN.mean(-1), values_EN.mean(-1), **look, markersize=4, label=setting.name)
        ax.set(xlabel=label, ylabel=study.metric)
    add_legend(figure)
    return figure


def training(study: Study) -> Figure | None:
    """Draw how training went, side by side: means over seeds, smoothed. Panels that nothing was recorded for are left out."""
    panels = []
    for metric, label in PANELS:
        curves = [(setting, *common_curve(setting, metric)) for setting in order_settings(study)]
        curves = [curve for curve in curves if len(curve[1])]
        if curves:
            panels.append((label, curves))
    if not panels:
        return None
    num_columns = min(3, len(panels))
    figure, axes = new_figure(-(-len(panels) // num_columns), num_columns, size=(3.4 * num_columns, 5.6))
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (label, curves) in zip(axes.flat, panels, strict=False):
        for setting, steps_E, values_EN in curves:
            window = statistics.smoothing_window(len(steps_E))
            look = style_of(study, setting) | {"marker": ""}
            # The steps are averaged like the values: each mean is drawn in the middle of its window, and none runs ahead.
            ax.plot(
                statistics.running_mean(steps_E, window),
                statistics.running_mean(values_EN.mean(-1), window),
                **look,
                label=setting.name,
            )
        ax.set_title(label, fontsize=9, loc="left")
        ax.set_xlabel("step")
    add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """Add one legend for all panels, above them: as many columns as the width holds, and the figure grows by its height."""
    # By label, each once: not every setting is in every panel.
    named = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}

    def above(num_columns: int) -> Legend:
        return figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=num_columns, frameon=False)

    # The widths of texts are known to matplotlib alone, and no column is wider than the widest: a legend of one column is
    # made, measured and taken away again. Without the growing the legend would take its height from the panels.
    single = above(1)
    widest = single.get_window_extent().width + LEGEND_GAP * figure.dpi
    single.remove()
    legend = above(min(len(named), max(1, int(figure.bbox.width / widest))))
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def order_settings(study: Study) -> list[Setting]:
    """Return the settings as the sweep lists them."""
    return sorted(study.settings, key=lambda setting: study.order.index(setting.name))
