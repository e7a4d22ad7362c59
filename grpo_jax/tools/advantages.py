"""Advantages that a variant gives one group of completions, as numbers and as a picture: a cell for each token."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from grpo_jax import objectives

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

FIVE = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
TITLES = {name: entry.title for name, entry in objectives.ENTRIES.items()}
EXPLANATION = """Left: the advantage of each token.
Right: what multiplies the gradient of its
log-probability on the first update,
advantage \N{MULTIPLICATION SIGN} weight / denominator, without
the KL penalty; a budget of {budget} tokens.

Blue becomes more likely, orange less likely."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Completions of one prompt, made up by hand.

    rewards_B: float32, 1 for a right one, 0 for a wrong one. lengths_B: int, tokens. entropy_BT: float32, of the sampling
    policy, nats; values behind a completion's end do not matter. budget: tokens that a completion may have.
    """

    rewards_B: np.ndarray
    lengths_B: np.ndarray
    entropy_BT: np.ndarray
    budget: int

    @property
    def mask_BT(self) -> np.ndarray:
        """Mask of the completions' tokens, float32."""
        return (np.arange(self.entropy_BT.shape[1]) < self.lengths_B[:, None]).astype(np.float32)


EXAMPLE = Group(
    rewards_B=np.array([1, 1, 0, 0], np.float32),
    lengths_B=np.array([3, 6, 6, 4]),
    entropy_BT=np.array(
        [
            [0.2, 1.6, 0.4, 0.0, 0.0, 0.0],
            [0.6, 0.4, 0.4, 2.0, 0.1, 0.3],
            [0.3, 0.2, 1.0, 0.1, 0.5, 0.2],
            [0.9, 0.6, 0.25, 0.4, 0.0, 0.0],
        ],
        np.float32,
    ),
    budget=8,
)


def credit(group: Group, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [B, T], the advantage, and the factor of a token's gradient: advantage * weight / denominator."""
    # On the first update the ratio is 1 and nothing is clipped: the factor is all that a variant does, but for its KL penalty.
    obj, mask_BT = objectives.get(variant), group.mask_BT
    adv_BT = objectives.advantages(obj, group.rewards_B, mask_BT, group.entropy_BT, group_size=len(group.rewards_B))
    weight_BT, denom = objectives.weights(obj, mask_BT, max_completion_length=group.budget)
    return np.asarray(adv_BT), np.asarray(adv_BT * weight_BT / denom)


def draw(group: Group, variants: Sequence[str]) -> bytes:
    """Draw a PNG: panels for each variant, advantage on the left, gradient coefficient on the right; entropy on top."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from PIL import Image  # matplotlib brings it

    credit_colours = LinearSegmentedColormap.from_list("credit", ["#b35900", "#ffffff", "#0060b0"])
    entropy_colours = LinearSegmentedColormap.from_list("entropy", ["#ffffff", "#6b6b6b"])
    figure = Figure(figsize=(9.2, 1.6 * (len(variants) + 1)), layout="constrained")
    axes = figure.subplots(len(variants) + 1, 2)
    heat(axes[0, 0], group, group.entropy_BT, "{:.2g}", entropy_colours, 0, 2.0)
    axes[0, 0].set_title("Given: entropy of the sampling policy, nats", loc="left", fontsize=11)
    axes[0, 1].set_axis_off()
    axes[0, 1].text(0, 0.5, EXPLANATION.format(budget=group.budget), va="center", fontsize=10)
    # One scale for all variants: a colour means the same in every row, or the rows could not be compared. White is 0.
    for variant, (left, right) in zip(variants, axes[1:], strict=True):
        adv_BT, coefficient_BT = credit(group, variant)
        heat(left, group, adv_BT, "{:+.2f}", credit_colours, -1.6, 1.6)
        heat(right, group, 100 * coefficient_BT, "{:+.1f}", credit_colours, -10, 10)
        left.set_title(f"{TITLES[variant]}: advantage", loc="left", fontsize=11)
        right.set_title(f"{TITLES[variant]}: gradient coefficient \N{MULTIPLICATION SIGN} 100", loc="left", fontsize=11)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(96).save(small, "PNG", optimize=True)  # a third of the bytes
    return small.getvalue()


def heat(ax, group: Group, values_BT: np.ndarray, form: str, colours: Colormap, low: float, high: float) -> None:
    """Draw a cell for each token, its number written in it; nothing where there is no token.

    Args:
      ax: panel to draw in.
      group: whose mask says where tokens are.
      values_BT: float32 [B, T], the numbers.
      form: format of a number.
      colours: from `low` to `high`.
      low, high: values at the ends of the colours.
    """
    scaled_BT, (B, T) = (values_BT - low) / (high - low), group.mask_BT.shape
    ax.imshow(np.ma.masked_where(group.mask_BT == 0, scaled_BT), cmap=colours, vmin=0, vmax=1, aspect="auto")
    for row, t in np.argwhere(group.mask_BT):
        # White on dark cells, black on light ones. The colour decides, not the value: both ends of the credit scale are dark.
        is_dark = np.mean(colours(scaled_BT[row, t])[:3]) < 0.5
        text = form.format(values_BT[row, t]).replace("-", "\N{MINUS SIGN}")
        ax.text(t, row, text, ha="center", va="center", fontsize=9.5, color="white" if is_dark else "black")
    ax.set_yticks(range(B), ["right" if reward > 0 else "wrong" for reward in group.rewards_B], fontsize=9.5)
    ax.set_xticks(range(T), [f"t = {t}" for t in range(T)], fontsize=8.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
