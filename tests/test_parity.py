"""Losses, gradients and advantages beside the numbers of the frameworks' own code (experiments/peers/trl_objectives.py)."""

import json
import pathlib

import jax
import numpy as np
import pytest

from grpo_jax import objectives
from tests.test_objectives import f32

TRL = json.loads((pathlib.Path(__file__).parent / "parity" / "trl.json").read_text())
BATCH = {key: f32(value) for key, value in TRL["batch"].items()}
OFF = {"kl_coef": 0.0}
# TRL's case -> ours. Its "cispo" has no lower bound and an upper one of `epsilon_high` itself.
OURS = {
    "grpo": ("grpo", {}),
    "dapo": ("dapo", {}),
    "dr_grpo": ("dr_grpo", {}),
    "gspo": ("gspo", {"clip_low": 0.1, "clip_high": 0.2}),
    "luspo": ("luspo", {"clip_low": 0.1, "clip_high": 0.2}),
    "cispo": ("cispo", {}),
    "sapo": ("sapo", {}),
    "vespo": ("vespo", {}),
    "dual_clip": ("trl_default", {"dual_clip": 1.5}),
    "opsm": ("deepseek_v32", OFF),
    "unbiased_kl": ("deepseek_v32", {"max_off_policy_kl": None, "kl_coef": 0.3}),
    "top_entropy": ("forking_tokens", {"clip_high": 0.2}),
    "entropy_bonus": ("entropy_bonus", {"entropy_coef": 0.01, "aggregation": "token_mean"}),
}


def close(ours, theirs):
    """Equal to 1e-6 of the largest number."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


def test_every_number_of_trl_is_compared():
    assert set(OURS) == set(TRL["losses"]) and len(TRL["advantages"]) == 4
    assert TRL["versions"]["trl"] == "1.16.0" and TRL["command"]
    lengths = set(BATCH["mask"].sum(1).tolist())
    assert len(lengths) > 4, "the batch is ragged"


@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradient_are_trls(name):
    variant, fields = OURS[name]
    obj, theirs = objectives.get(variant, **fields), TRL["losses"][name]
    adv_BT = BATCH["advantage"][:, None] * BATCH["mask"]
    if obj.token_filter == "top_entropy":  # the filter is a part of the advantage here, of the loss there
        adv_BT = filtered(obj, adv_BT)
    rest = BATCH["old_logp"], BATCH["ref_logp"], adv_BT, BATCH["mask"]
    kwargs = {"max_completion_length": TRL["max_completion_length"], "entropy_BT": BATCH["entropy"]}

    def loss_of(logp_BT):
        return objectives.loss(obj, logp_BT, *rest, **kwargs)[0]

    loss, grad_BT = jax.value_and_grad(loss_of)(BATCH["logp"])
    scale = np.abs(theirs["gradient"]).sum()  # of what the loss is a sum of
    np.testing.assert_allclose(float(loss), theirs["loss"], rtol=1e-6, atol=1e-6 * scale)
    close(grad_BT, theirs["gradient"])


def filtered(obj, adv_BT):
    """The advantages that the filter of tokens leaves: those of rows whose rewards differ, scaled to the ones at hand."""
    rewards_B = f32(np.arange(len(adv_BT)) % TRL["group_size"])
    whole_BT, kept_BT = (
        objectives.advantages(each, rewards_B, BATCH["mask"], BATCH["entropy"], group_size=TRL["group_size"])
        for each in (objectives.get("grpo"), obj)
    )
    assert 0.1 < float(((kept_BT != 0) & (whole_BT != 0)).sum() / BATCH["mask"].sum()) < 0.3
    return adv_BT * (kept_BT != 0)


@pytest.mark.parametrize(
    ("name", "variant", "fields"),
    [
        ("group", "grpo", {"adv_eps": 1e-4}),
        ("none", "dr_grpo", {}),
        ("batch", "lite_ppo", {"adv_eps": 1e-4}),
        ("gdpo", "gdpo", {"adv_eps": 1e-4}),
    ],
)
def test_advantages_are_trls(name, variant, fields):
    obj, parts_BK = objectives.get(variant, **fields), BATCH["rewards"]
    rewards = parts_BK.sum(1), BATCH["mask"], BATCH["entropy"]
    adv_BT = objectives.advantages(obj, *rewards, group_size=TRL["group_size"], reward_parts_BK=parts_BK)
    close(adv_BT[:, 0], TRL["advantages"][name]["values"])
