"""Draws docs/advantages.png, what each variant makes of the guide's one group: python -m docs.figures"""

from __future__ import annotations

import io
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from grpo_jax import objectives

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

BUDGET = 8  # tokens, L
REWARDS_B = np.array([1, 1, 0, 0], np.float32)
LENGTHS_B = np.array([3, 6, 6, 4])
MASK_BT = (np.arange(6) < LENGTHS_B[:, None]).astype(np.float32)
ENTROPY_BT = np.array(
    [
        [0.2, 1.6, 0.4, 0.0, 0.0, 0.0],
        [0.6, 0.4, 0.4, 2.0, 0.1, 0.3],
        [0.3, 0.2, 1.0, 0.1, 0.5, 0.2],
        [0.9, 0.6, 0.25, 0.4, 0.0, 0.0],
    ],
    np.float32,
)  # nats
ROWS = ("right", "right", "wrong", "wrong")
DRAWN = {"grpo": "GRPO", "dapo": "DAPO", "dr_grpo": "Dr. GRPO", "gtpo": "GTPO", "grpo_s": "GRPO-S", "gspo": "GSPO"}
TITLES = {**DRAWN, "rloo": "RLOO", "reinforce_pp": "REINFORCE++", "cispo": "CISPO", "gmpo": "GMPO"}  # sections of the guide
EXPLANATION = """Left: the advantage of each token.
Right: what multiplies the gradient of its
log-probability on the first update,
advantage \N{MULTIPLICATION SIGN} weight / denominator, without
the KL penalty; a budget of 8 tokens.

Blue becomes more likely, orange less likely."""


def credit(variant: str) -> tuple[np.ndarray, np.ndarray]:
    """-> (advantage, what multiplies a token's gradient on the first update: advantage * weight / denominator), both [B, T]."""
    obj = objectives.get(variant)
    adv_BT = objectives.advantages(obj, REWARDS_B, MASK_BT, ENTROPY_BT, group_size=len(REWARDS_B))
    weight_BT, denom = objectives.weights(obj, MASK_BT, max_completion_length=BUDGET)
    return np.asarray(adv_BT), np.asarray(adv_BT * weight_BT / denom)


def draw(path: pathlib.Path) -> None:
    """One row of panels a variant: advantage on the left, gradient coefficient on the right; entropy on top."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from PIL import Image  # matplotlib brings it

    credit_colours = LinearSegmentedColormap.from_list("credit", ["#b35900", "#ffffff", "#0060b0"])
    entropy_colours = LinearSegmentedColormap.from_list("entropy", ["#ffffff", "#6b6b6b"])
    figure = Figure(figsize=(9.2, 11.2), layout="constrained")
    axes = figure.subplots(len(DRAWN) + 1, 2)
    heat(axes[0, 0], ENTROPY_BT, "{:.2g}", entropy_colours, 0, 2.0)
    axes[0, 0].set_title("Given: entropy of the sampling policy, nats", loc="left", fontsize=11)
    axes[0, 1].set_axis_off()
    axes[0, 1].text(0, 0.5, EXPLANATION, va="center", fontsize=10)
    for (variant, title), (left, right) in zip(DRAWN.items(), axes[1:], strict=True):
        adv_BT, coefficient_BT = credit(variant)
        heat(left, adv_BT, "{:+.2f}", credit_colours, -1.6, 1.6)
        heat(right, 100 * coefficient_BT, "{:+.1f}", credit_colours, -10, 10)
        left.set_title(f"{title}: advantage", loc="left", fontsize=11)
        right.set_title(f"{title}: gradient coefficient \N{MULTIPLICATION SIGN} 100", loc="left", fontsize=11)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(96).save(path, optimize=True)  # a third of the bytes


def heat(ax, values_BT: np.ndarray, form: str, colours: Colormap, low: float, high: float) -> None:
    """A cell for each token, its number written in it; nothing where there is no token."""
    scaled_BT = (values_BT - low) / (high - low)
    ax.imshow(np.ma.masked_where(MASK_BT == 0, scaled_BT), cmap=colours, vmin=0, vmax=1, aspect="auto")
    for row, t in np.argwhere(MASK_BT):
        is_dark = np.mean(colours(scaled_BT[row, t])[:3]) < 0.5
        text = form.format(values_BT[row, t]).replace("-", "\N{MINUS SIGN}")
        ax.text(t, row, text, ha="center", va="center", fontsize=9.5, color="white" if is_dark else "black")
    ax.set_yticks(range(len(ROWS)), ROWS, fontsize=9.5)
    ax.set_xticks(range(MASK_BT.shape[1]), [f"t = {t}" for t in range(MASK_BT.shape[1])], fontsize=8.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


if __name__ == "__main__":
    draw(pathlib.Path(__file__).parent / "advantages.png")
