"""Losses, gradients and advantages of verl's own code on one ragged batch, as numbers that tests/test_parity.py compares with.

In an environment with verl's wheel (without its dependencies), torch, omegaconf and tensordict, from the clone:

    python experiments/peers/verl_objectives.py --out=tests/parity/verl.json
"""

import argparse
import pathlib

import numpy as np
import torch
from parity_batch import BUDGET, B, G, make_batch, write  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]
from verl.workers.config import ActorConfig  # pyright: ignore[reportMissingImports]

# Name -> (its policy loss, its aggregation, settings of the actor, settings of actor.policy_loss).
CASES = {
    "grpo": ("vanilla", "seq-mean-token-mean", {}, {}),
    "dapo": ("vanilla", "token-mean", {"clip_ratio_high": 0.28, "clip_ratio_c": 1.5}, {}),
    "dr_grpo": ("vanilla", "seq-mean-token-sum-norm", {"loss_scale_factor": BUDGET}, {}),
    "sequence_sum": ("vanilla", "seq-mean-token-sum", {}, {}),
    "dppo_tv": ("dppo_tv", "token-mean", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 1.2}, {}),
    "dppo_kl": ("dppo_kl", "token-mean", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02}, {}),
    "gspo": ("gspo", "seq-mean-token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, {}),
    "sapo": ("sapo", "seq-mean-token-mean", {}, {}),
    "gpg": ("gpg", "token-mean", {}, {}),
    "kl_cov": ("kl_cov", "token-mean", {}, {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}),
    "gmpo": ("geo_mean", "seq-mean-token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, {}),
    "cispo": ("cispo", "token-mean", {"clip_ratio_high": 0.28}, {}),
    "dro": ("dro", "token-mean", {}, {"dro_beta": 0.1}),
}
KL = ("kl", "mse", "low_var_kl")
# Name -> (its estimator, settings).
ADVANTAGES = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("grpo", {"norm_adv_by_std_in_grpo": False}),
    "pass_at_k": ("grpo_passk", {"config": {"norm_adv_by_std_in_grpo": False}}),
    "rloo": ("rloo", {}),
    "opo": ("opo", {}),
    "reinforce_pp_baseline": ("reinforce_plus_plus_baseline", {}),
    "gpg": ("gpg", {}),
}


def loss_and_gradient(case, tensors):
    """One policy loss and its gradient by the log-probabilities."""
    name, aggregation, settings, policy = case
    settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, **settings}
    scale = settings.pop("loss_scale_factor", None)
    config = ActorConfig(strategy="fsdp", rollout_n=G, ppo_micro_batch_size_per_gpu=1, **settings)
    for field, value in policy.items():
        object.__setattr__(config.policy_loss, field, value)
    if scale:
        config.global_batch_info["loss_scale_factor"] = scale
    logp = tensors["logp"].clone().requires_grad_()
    arrays = tensors["old_logp"], logp, tensors["advantage"][:, None] * tensors["mask"], tensors["mask"]
    loss, _ = core_algos.get_policy_loss_fn(name)(*arrays, loss_agg_mode=aggregation, config=config)
    loss.backward()
    return {"loss": loss.item(), "gradient": np.asarray(logp.grad).tolist()}


def kl_and_gradient(name, tensors):
    """The mean over tokens of one KL estimate, and its gradient."""
    logp = tensors["logp"].clone().requires_grad_()
    penalty = core_algos.kl_penalty(logp, tensors["ref_logp"], name)
    loss = core_algos.agg_loss(penalty, tensors["mask"], "token-mean")
    loss.backward()
    return {"loss": loss.item(), "gradient": np.asarray(logp.grad).tolist()}


def advantages(case, tensors):
    """Advantages of rows whose rewards stand at their last token."""
    name, settings = case
    rewards = torch.zeros_like(tensors["mask"])
    last = tensors["mask"].sum(1).long() - 1
    rewards[torch.arange(B), last] = tensors["rewards"].sum(1)
    index = np.arange(B) // G
    function = core_algos.get_adv_estimator_fn(name)
    values, _ = function(token_level_rewards=rewards, response_mask=tensors["mask"], index=index, **settings)
    return values.tolist()


def main():
    """Write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    batch = make_batch()
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in batch.items()}
    losses = {name: {"settings": case, **loss_and_gradient(case, tensors)} for name, case in CASES.items()}
    losses |= {f"kl_{name}": {"settings": name, **kl_and_gradient(name, tensors)} for name in KL}
    values = {name: {"settings": case, "values": advantages(case, tensors)} for name, case in ADVANTAGES.items()}
    write(args.out, ("verl", "torch", "numpy"), batch, losses, values)


if __name__ == "__main__":
    main()
