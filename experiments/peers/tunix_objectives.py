"""Losses, gradients and advantages of Tunix's own code on one ragged batch, as numbers that tests/test_parity.py compares with.

In an environment with jax, flax and Tunix's wheel (without its dependencies, most of which its losses do not need):

    pip install jax flax jaxtyping && pip install --no-deps google-tunix==0.1.7
    python experiments/peers/tunix_objectives.py --out=tests/parity/tunix.json
"""

import argparse
import importlib.util
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from parity_batch import B, G, T, make_batch, write  # pyright: ignore[reportMissingImports]

# What a GRPOConfig says, with its KL off; "epsilon_high" is DAPOConfig's, "epsilon_c" the dual clip's.
DEFAULT = {"loss_algo": "grpo", "loss_agg_mode": "sequence-mean-token-mean", "epsilon": 0.2, "beta": 0.0, "kl_loss_mode": "kl"}
CASES = {
    "tunix_default": {"beta": 0.04},
    "grpo": {"beta": 0.04, "kl_loss_mode": "low_var_kl"},
    "mse_kl": {"beta": 0.3, "kl_loss_mode": "mse_kl"},
    "dapo": {"loss_agg_mode": "token-mean", "epsilon_high": 0.28, "beta": None},
    "dr_grpo": {"loss_agg_mode": "sequence-mean-token-scale"},
    "sequence_sum": {"loss_agg_mode": "seq-mean-token-sum"},
    "gspo_token": {"loss_algo": "gspo-token", "epsilon": 0.1, "epsilon_high": 0.2},
    "dual_clip": {"loss_agg_mode": "token-mean", "epsilon_c": 1.5},
    "sampler_weights": {"loss_agg_mode": "token-mean"},
}
ADVANTAGES = {"grpo": "grpo", "dr_grpo": "drgrpo", "rloo": "rloo"}


def load():
    """The module of the losses, without the package's own __init__, which imports all of its dependencies."""
    spec = importlib.util.find_spec("tunix")
    assert spec and spec.submodule_search_locations, "no tunix in this environment"
    for name in ("tunix", "tunix.sft"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(pathlib.Path(*spec.submodule_search_locations, *name.split(".")[1:]))]
    # Of its helpers for training these two are read when the module is imported; no loss below calls them.
    helpers = sys.modules["tunix.sft.utils"] = types.ModuleType("tunix.sft.utils")
    vars(helpers).update(make_causal_attn_mask=None, build_positions_from_mask=None)
    return importlib.import_module("tunix.rl.algo_core")


def loss_and_gradient(core, name, batch):
    """One loss and its gradient by the log-probabilities, in the float32 that it is computed in."""
    from flax import nnx  # pyright: ignore[reportMissingImports]

    class Policy(nnx.Module):
        """A model whose weights are the log-probabilities."""

        def __init__(self, logp_BT):
            self.logp_BT = nnx.Param(logp_BT)

    # In place of a forward pass. The logits are for the entropy that it reports.
    core.common.compute_per_token_logps = lambda graph, state, **_: (
        nnx.merge(graph, state).logp_BT[...],
        jnp.zeros((B, T, 2)),
    )
    config = types.SimpleNamespace(**{**DEFAULT, "temperature": 1.0, "kl_clamp_value": None, **CASES[name]})
    arrays = {key: jnp.asarray(batch[key], jnp.float32) for key in ("old_logp", "ref_logp", "advantage", "mask", "entropy")}
    weights = {"sampler_is_weights": arrays["entropy"]} if name == "sampler_weights" else {}
    example = types.SimpleNamespace(
        prompt_ids=None,
        completion_ids=None,
        completion_mask=arrays["mask"],
        advantages=arrays["advantage"],
        old_per_token_logps=arrays["old_logp"],
        ref_per_token_logps=arrays["ref_logp"],
        **weights,
    )

    def loss_of(logp_BT):
        return core.grpo_loss_fn(Policy(logp_BT), example, config, pad_id=0, eos_id=1)[0]

    loss, grad_BT = jax.value_and_grad(loss_of)(jnp.asarray(batch["logp"], jnp.float32))
    return {"loss": float(loss), "gradient": np.asarray(grad_BT).tolist()}


def main():
    """Write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    core, batch = load(), make_batch()
    losses = {name: {"settings": {**DEFAULT, **case}, **loss_and_gradient(core, name, batch)} for name, case in CASES.items()}
    rewards_B = batch["rewards"].sum(1)
    values = {
        name: {
            "settings": theirs,
            "values": np.asarray(core.function_registry.get_advantage_estimator(theirs)(rewards_B, G)).tolist(),
        }
        for name, theirs in ADVANTAGES.items()
    }
    write(args.out, ("google-tunix", "jax", "flax", "numpy"), batch, losses, values)


if __name__ == "__main__":
    main()
