"""Losses, gradients and advantages of SkyRL's own code on one ragged batch, as numbers that tests/test_parity.py compares with.

In an environment with the wheels skyrl and skyrl-gym (without their dependencies), torch, ray, omegaconf and loguru:

    python experiments/peers/skyrl_objectives.py --out=tests/parity/skyrl.json
"""

import argparse
import pathlib
import typing

import numpy as np
import torch
import typing_extensions
from parity_batch import BUDGET, B, G, make_batch, write  # pyright: ignore[reportMissingImports]

typing.TypedDict = typing_extensions.TypedDict  # before Python 3.12 its configs take no other
from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402 # pyright: ignore[reportMissingImports]
from skyrl.train.config import AlgorithmConfig  # noqa: E402 # pyright: ignore[reportMissingImports]

# Name -> (its policy loss, its reduction, settings, by the group that they are in).
CASES = {
    "grpo": ("regular", "token_mean", {}),
    "dr_grpo": ("regular", "seq_mean_token_sum_norm", {}),
    "dual_clip": ("dual_clip", "sequence_mean", {"clip_ratio_c": 1.5, "eps_clip_high": 0.28}),
    "gspo": ("gspo", "sequence_mean", {"eps_clip_low": 0.1, "eps_clip_high": 0.2}),
    "sapo": ("sapo", "sequence_mean", {}),
    "cispo": ("cispo", "token_mean", {"cispo.cispo_eps_clip_low": 1.0, "cispo.cispo_eps_clip_high": 0.28}),
    "dppo_tv": ("dppo", "token_mean", {"dppo.dppo_type": "binary_tv", "dppo.delta_low": 0.05, "dppo.delta_high": 0.1}),
    "dppo_kl": ("dppo", "token_mean", {"dppo.dppo_type": "binary_kl", "dppo.delta_low": 0.01, "dppo.delta_high": 0.02}),
}
ADVANTAGES = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("grpo", {"grpo_norm_by_std": False}),
    "rloo": ("rloo", {}),
    "maxrl": ("maxrl", {}),
}


def loss_and_gradient(case, tensors):
    """One policy loss, reduced by scaled advantages as its trainer does, and its gradient by the log-probabilities."""
    name, reduction, settings = case
    config = AlgorithmConfig(policy_loss_type=name, eps_clip_low=0.2, eps_clip_high=0.2)
    for field, value in settings.items():
        *group, last = field.split(".")
        setattr(getattr(config, group[0]) if group else config, last, value)
    logp, mask = tensors["logp"].clone().requires_grad_(), tensors["mask"]
    scaled = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        tensors["advantage"][:, None] * mask, mask, reduction, micro_batch_size=B, max_seq_len=BUDGET
    )
    loss, _ = ppo_utils.PolicyLossRegistry.get(name)(logp, tensors["old_logp"], scaled, config, mask)
    loss.backward()
    return {"loss": loss.item(), "gradient": np.asarray(logp.grad).tolist()}


def advantages(case, tensors):
    """Advantages of rows whose rewards stand at their last token."""
    name, settings = case
    rewards = torch.zeros_like(tensors["mask"])
    rewards[torch.arange(B), tensors["mask"].sum(1).long() - 1] = tensors["rewards"].sum(1)
    function = ppo_utils.AdvantageEstimatorRegistry.get(name)
    values, _ = function(token_level_rewards=rewards, response_mask=tensors["mask"], index=np.arange(B) // G, **settings)
    return values.tolist()


def main():
    """Write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    batch = make_batch()
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in batch.items()}
    losses = {name: {"settings": case, **loss_and_gradient(case, tensors)} for name, case in CASES.items()}
    values = {name: {"settings": case, "values": advantages(case, tensors)} for name, case in ADVANTAGES.items()}
    write(args.out, ("skyrl", "torch", "numpy"), batch, losses, values)


if __name__ == "__main__":
    main()
