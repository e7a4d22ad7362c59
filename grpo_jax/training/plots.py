"""A run's learning curve as a picture."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence

import numpy as np

from grpo_jax.analysis.statistics import running_mean, smoothing_window
from grpo_jax.files import write_atomically
from grpo_jax.training.runlog import points

PANELS = (
    (
        "success",
        (("reward/success", "training"), ("eval/success", "held-out, greedy"), ("eval/mean@", "held-out, sampled")),
    ),
    ("reward", (("reward/mean", "with shaping"),)),
    ("entropy (nats)", (("policy/entropy", "sampling policy"),)),
    ("length (tokens)", (("completion/length_mean", "mean"),)),
)


def learning_curve(records: Sequence[dict[str, float]], title: str, path: pathlib.Path) -> None:
    """Draw success, reward, entropy and length over the steps, and write a PNG."""
    # Here, not above: a slow import that most of a run does without. A Figure of its own, without pyplot, needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    for axes, (label, curves) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key, name in curves:
            curve = points(records, key)
            if curve:
                is_evaluated = key.startswith("eval/")
                # Training is noisy from step to step. The steps are averaged like the values, so that none runs ahead.
                window = 1 if is_evaluated else smoothing_window(len(curve))
                steps, values = (running_mean(np.asarray(each), window) for each in zip(*curve, strict=True))
                marker = "o" if is_evaluated else ""
                (line,) = axes.plot(steps, values, marker=marker, markersize=3, linewidth=1, label=name)
                low, high = points(records, f"{key}_low"), points(records, f"{key}_high")
                if low and high:
                    steps, lows = zip(*low, strict=True)
                    axes.fill_between(steps, lows, [value for _, value in high], color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
