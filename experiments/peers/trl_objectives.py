"""Losses, gradients and advantages of TRL's own code on one ragged batch, as numbers that tests/test_parity.py compares with.

In an environment with TRL (its wheel and torch are all it needs), from the clone:

    python experiments/peers/trl_objectives.py --out=tests/parity/trl.json
"""

import argparse
import inspect
import pathlib
import textwrap
from types import SimpleNamespace

import numpy as np
import torch
from parity_batch import BUDGET, B, G, T, make_batch, write  # pyright: ignore[reportMissingImports]
from trl.trainer import grpo_trainer  # pyright: ignore[reportMissingImports]
from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

ENTROPY = 0.01
# Name -> what a GRPOConfig would say. "entropy_coef" adds TRL's bonus to its "dapo".
CASES = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.04},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "dual_clip": {"loss_type": "dapo", "delta": 1.5},
    "opsm": {"loss_type": "grpo", "off_policy_mask_threshold": 0.1},
    "unbiased_kl": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
    "top_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.2},
    "entropy_bonus": {"loss_type": "dapo", "entropy_coef": ENTROPY},
}
# Of the adaptive weight; factors: of the batch's entropies, about 1.5 nats, in each step.
CONTROL = {
    "entropy_coef": 0.01,
    "entropy_target": 1.0,
    "entropy_coef_delta": 0.02,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 0.06,
    "factors": [1.0, 0.5, 0.4, 0.9, 0.3, 0.3, 0.3, 0.3, 1.2, 0.6, 2.0, 2.0, 2.0, 2.0, 0.1],
}
ADVANTAGES = {
    "group": {"scale_rewards": "group"},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "gdpo": {"scale_rewards": "group", "multi_objective_aggregation": "normalize_then_sum"},
}


def trainer_of(case):
    """A trainer with the settings that its loss reads, and without a model."""
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    low = case.get("epsilon", 0.2)
    args = SimpleNamespace(
        delta=case.get("delta"),
        use_bias_correction_kl=case.get("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    settings = {
        "args": args,
        "loss_type": case["loss_type"],
        "beta": case.get("beta", 0.0),
        "epsilon_low": low,
        "epsilon_high": case.get("epsilon_high", low),
        "importance_sampling_level": case.get("importance_sampling_level", "token"),
        "top_entropy_quantile": case.get("top_entropy_quantile", 1.0),
        "off_policy_mask_threshold": case.get("off_policy_mask_threshold"),
        "max_completion_length": BUDGET,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": "entropy_coef" in case,
        "use_adaptive_entropy": False,
        "entropy_coef": case.get("entropy_coef", 0.0),
        "accelerator": SimpleNamespace(
            num_processes=1,
            sync_gradients=False,
            gather=lambda x: x,
            reduce=lambda x, **_: x,
            gather_for_metrics=lambda x: x,
            pad_across_processes=lambda x, **_: x,
            unwrap_model=lambda x: x,
        ),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": Metrics()},
    }
    trainer.__dict__.update(settings)
    return trainer


class Metrics(dict):
    """A dictionary of lists that come into being when they are asked for."""

    def __missing__(self, key):
        self[key] = []
        return self[key]


def loss_and_gradient(case, batch):
    """The trainer's `_compute_loss` with the model's forward pass replaced by the batch's log-probabilities."""
    trainer = trainer_of(case)
    logp, inputs = inputs_of(trainer, batch)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": np.asarray(logp.grad).tolist()}


def inputs_of(trainer, batch, entropy=None):
    """Log-probabilities that the forward pass will return, and what else the loss reads. entropy: None, the batch's."""
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in batch.items()}
    logp = tensors["logp"].clone().requires_grad_()
    entropy = tensors["entropy"].clone() if entropy is None else entropy
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, entropy, None)
    ids = torch.zeros((B, T), dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones((B, 1)),
        "completion_ids": ids,
        "completion_mask": tensors["mask"],
        "advantages": tensors["advantage"],
        "old_per_token_logps": tensors["old_logp"],
        "ref_per_token_logps": tensors["ref_logp"],
        "num_items_in_batch": tensors["mask"].sum(),
    }
    return logp, inputs


def advantages(settings, batch):
    """The lines of `_generate_and_score_completions` that turn rewards into advantages, as they stand in the file."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    start = source.index('        if self.multi_objective_aggregation == "sum_then_normalize"')
    end = source.index("        # Slice to keep only the local part of the data")
    rewards = torch.tensor(batch["rewards"], dtype=torch.float64)
    names = {
        "self": SimpleNamespace(
            **{"multi_objective_aggregation": "sum_then_normalize", **settings},
            reward_weights=torch.ones(2, dtype=torch.float64),
            reward_funcs=[None, None],
        ),
        "rewards_per_func": rewards,
        "unscorable_mask": torch.zeros(B, dtype=torch.bool),
        "num_generations": G,
        "device": "cpu",
    }
    exec(textwrap.dedent(source[start:end]), {**vars(grpo_trainer)}, names)
    return names["advantages"].tolist()


def adaptive_entropy(batch):
    """The weight of the entropy bonus after each of some steps, whose entropies are the batch's times a factor."""
    mask, entropy = (torch.tensor(batch[key], dtype=torch.float64) for key in ("mask", "entropy"))
    trainer = trainer_of({"loss_type": "dapo", "entropy_coef": CONTROL["entropy_coef"]})
    trainer.use_adaptive_entropy, trainer.accelerator.sync_gradients = True, True
    trainer._entropy_window_stats, trainer._last_world_entropy = None, 0.0
    vars(trainer.args).update({name: value for name, value in CONTROL.items() if name not in ("entropy_coef", "factors")})
    coefs, entropies = [], []
    for factor in CONTROL["factors"]:
        trainer._compute_loss(trainer.model, inputs_of(trainer, batch, entropy=entropy * factor)[1])
        coefs.append(trainer.entropy_coef)
        entropies.append(((entropy * factor * mask).sum() / mask.sum()).item())
    return {"settings": CONTROL, "entropies": entropies, "coefs": coefs}


def main():
    """Write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    batch = make_batch()
    losses = {name: {"settings": case, **loss_and_gradient(case, batch)} for name, case in CASES.items()}
    values = {name: {"settings": case, "values": advantages(case, batch)} for name, case in ADVANTAGES.items()}
    write(args.out, ("trl", "torch", "numpy"), batch, losses, values, adaptive_entropy=adaptive_entropy(batch))


if __name__ == "__main__":
    main()
