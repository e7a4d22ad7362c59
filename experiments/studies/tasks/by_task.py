"""Draw what the variants differ by from GRPO on every task that was run with eight seeds and more.

    python -m experiments.studies.tasks.by_task experiments/studies/tasks/by_task.png

Reads the results.csv of each study, which `grpo-jax report` wrote.
"""

import csv
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

STUDIES = pathlib.Path(__file__).parent.parent
TASKS = {
    "sums to 99": "variants",
    "sums to 299": "harder",
    "chain": "chain",
    "countdown": "countdown",
    "maze": "maze",
    "forks, 60 steps at 6e-4": "forks",
    "forks, 120 steps at 1e-4": "forks/at_1e-4",
}
VARIANTS = ("dapo", "dr_grpo", "gtpo", "grpo_s")
WIDTH = 0.18  # between variants of one task


def differences(study: str) -> dict[str, tuple[float, float, float, bool]]:
    """Return {variant: (difference from GRPO, its interval's ends, it is shown after Holm)} of a study."""
    with open(STUDIES / study / "results.csv", encoding="utf-8") as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    found = {}
    for name in VARIANTS:
        row = rows.get(name)
        if row is None or not row["difference"]:
            continue
        middle = float(row["difference"])
        low, high = (float(row[f"difference_{end}"] or middle) for end in ("low", "high"))
        found[name] = middle, low, high, float(row["p_holm"] or 1) <= 0.05 and low * high > 0
    return found


def main(path: str) -> None:
    """Draw and save it."""
    figure, axes = plt.subplots(figsize=(9, 4.2), constrained_layout=True)
    colors: dict[str, str] = {name: f"C{place}" for place, name in enumerate(VARIANTS)}
    for place, (_, study) in enumerate(TASKS.items()):
        for name, (middle, low, high, is_shown) in differences(study).items():
            y = -place - (VARIANTS.index(name) - 1.5) * WIDTH
            axes.plot([low, high], [y, y], color=colors[name], linewidth=1.6)
            face = colors[name] if is_shown else "white"
            axes.plot(middle, y, "o", color=colors[name], markerfacecolor=face, markersize=5.5)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(TASKS))], list(TASKS))
    axes.set_xlabel("held-out success minus GRPO's, 95 % interval over paired seeds; filled: shown after Holm's correction")
    handles = [Line2D([], [], marker="o", color=colors[name], markerfacecolor="white", label=name) for name in VARIANTS]
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=8)
    axes.grid(axis="x", color="0.9")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
