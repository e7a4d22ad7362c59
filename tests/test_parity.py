"""Losses, gradients and advantages beside the numbers of the frameworks' own code (experiments/peers/*_objectives.py)."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from grpo_jax import objectives
from grpo_jax.objectives.adaptive import adapt_entropy_coef
from tests.test_objectives import f32

PARITY = pathlib.Path(__file__).parent / "parity"
TRL, VERL, SKYRL, PRIME_RL, TUNIX = (
    json.loads((PARITY / f"{name}.json").read_text()) for name in ("trl", "verl", "skyrl", "prime_rl", "tunix")
)
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


def test_the_entropy_bonus_is_steered_as_trls():
    """The weight after each step. TRL applies it by the entropy of the step before, the paper and ours by that of the step."""
    numbers = TRL["adaptive_entropy"]
    settings, c = numbers["settings"], numbers["settings"]["entropy_coef"]
    obj = objectives.get(
        "adaptive_entropy",
        entropy_target=settings["entropy_target"],
        entropy_coef_step=settings["entropy_coef_delta"],
        entropy_coef_max=settings["entropy_coef_max"],
    )
    for entropy, expected in zip(numbers["entropies"], numbers["coefs"], strict=True):
        _, c = adapt_entropy_coef(dataclasses.replace(obj, entropy_coef=f32(c)), f32(entropy))
        assert float(c) == pytest.approx(expected, abs=1e-7)
    assert {0.0, settings["entropy_coef_max"]} < {round(each, 6) for each in numbers["coefs"]}


# --- verl, SkyRL, prime-rl and Tunix

NO_KL: dict = {"kl_coef": 0.0}
TOKENS = {"aggregation": "token_mean"}
# verl's loss -> ours. Its dual clip is on by default, at 3. "dppo": it hands the actor's clip_ratio_c on as the largest weight,
# 3 and not the paper's 20. "dro": its b is twice our drift_coef. "geo_mean" clips logs, and by log bounds.
VERLS = {
    "grpo": ("grpo", {"dual_clip": 3.0, **NO_KL}),
    "dapo": ("dapo", {"dual_clip": 1.5}),
    "dr_grpo": ("dr_grpo", {"dual_clip": 3.0, **NO_KL}),
    "sequence_sum": ("grpo", {"dual_clip": 3.0, "aggregation": "sequence_sum", **NO_KL}),
    "dppo_tv": ("dppo_tv", {"clip_low": 0.05, "clip_high": 0.1, "max_ratio": 1.2}),
    "dppo_kl": ("dppo_kl", {"clip_low": 0.01, "clip_high": 0.02, "max_ratio": 3.0}),
    "gspo": ("gspo", {"clip_low": 0.1, "clip_high": 0.2}),
    "sapo": ("sapo", {}),
    "gpg": ("gpg", {}),
    "kl_cov": ("kl_cov", {"cov_share": 0.1}),
    "gmpo": ("gmpo", {"clip_low": 1 - math.exp(-0.1), "clip_high": math.exp(0.2) - 1}),
    "cispo": ("cispo", {"clip_low": 0.2, "clip_high": 0.28}),
    "dro": ("dro", {}),
    "kl_kl": ("grpo", {"kl_coef": 1.0, "kl_estimator": "k1", **TOKENS}),
    "kl_mse": ("grpo", {"kl_coef": 1.0, "kl_estimator": "k2", **TOKENS}),
    "kl_low_var_kl": ("grpo", {"kl_coef": 1.0, "kl_estimator": "k3", **TOKENS}),
}
# SkyRL multiplies by the ratio where DPPO's paper has sg(w) log pi: the gradient is the same, the value is not.
SKYRLS = {
    "grpo": ("grpo", {**NO_KL, **TOKENS}),
    "dr_grpo": ("dr_grpo", NO_KL),
    "dual_clip": ("grpo", {"clip_high": 0.28, "dual_clip": 1.5, **NO_KL}),
    "gspo": ("gspo", {"clip_low": 0.1, "clip_high": 0.2}),
    "sapo": ("sapo", {}),
    "cispo": ("cispo", {"clip_high": 0.28}),
    "dppo_tv": ("dppo_tv", {"clip_low": 0.05, "clip_high": 0.1}),
    "dppo_kl": ("dppo_kl", {"clip_low": 0.01, "clip_high": 0.02}),
}
PRIME_RLS = {
    "prime_rl_default": ("prime_rl_default", {}),
    "narrow": ("prime_rl_default", {"clip_low": 0.02, "clip_high": 0.05, "drift_coef": 0.1}),
}
# Tunix's Dr. GRPO divides by the width of the batch where the paper has the budget: compared at a budget of that width. Its
# weights of the sampler are handed to it, and are a factor of the advantage here. Its numbers are float32.
TUNIXS = {
    "tunix_default": ("tunix_default", {}),
    "grpo": ("grpo", {}),
    "mse_kl": ("grpo", {"kl_coef": 0.3, "kl_estimator": "k2"}),
    "dapo": ("dapo", {}),
    "dr_grpo": ("dr_grpo", NO_KL),
    "sequence_sum": ("grpo", {"aggregation": "sequence_sum", **NO_KL}),
    "gspo_token": ("gspo_token", {"clip_low": 0.1, "clip_high": 0.2}),
    "dual_clip": ("grpo", {"dual_clip": 1.5, **NO_KL, **TOKENS}),
    "sampler_weights": ("grpo", {**NO_KL, **TOKENS}),
}
OTHERS = [
    *(("verl", VERL, name, *ours) for name, ours in VERLS.items()),
    *(("skyrl", SKYRL, name, *ours) for name, ours in SKYRLS.items()),
    *(("prime_rl", PRIME_RL, name, *ours) for name, ours in PRIME_RLS.items()),
    *(("tunix", TUNIX, name, *ours) for name, ours in TUNIXS.items()),
]


def test_every_number_of_the_others_is_compared():
    for theirs, ours in ((VERL, VERLS), (SKYRL, SKYRLS), (PRIME_RL, PRIME_RLS), (TUNIX, TUNIXS)):
        assert set(ours) == set(theirs["losses"]) and theirs["batch"] == TRL["batch"] and theirs["command"]
    assert (VERL["versions"]["verl"], SKYRL["versions"]["skyrl"]) == ("0.9.1", "0.3.0")
    assert TUNIX["versions"]["google-tunix"] == "0.1.7"
    for numbers, ours in ((VERL, VERLS_ADVANTAGES), (SKYRL, SKYRLS_ADVANTAGES), (TUNIX, TUNIXS_ADVANTAGES)):
        assert set(numbers["advantages"]) == set(ours)


@pytest.mark.parametrize(
    ("framework", "numbers", "name", "variant", "fields"), OTHERS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_loss_and_gradient_are_theirs(framework, numbers, name, variant, fields):
    obj, theirs = objectives.get(variant, **fields), numbers["losses"][name]
    is_kl_alone = name.startswith("kl_") and obj.has_kl
    adv_BT = BATCH["advantage"][:, None] * BATCH["mask"] * (not is_kl_alone)
    budget = numbers["max_completion_length"]
    if framework == "tunix":
        budget = adv_BT.shape[1]
        if name == "sampler_weights":
            adv_BT = adv_BT * BATCH["entropy"]
    penalised_BT = None
    if obj.cov_penalty:
        penalised_BT = objectives.penalised_tokens(obj, adv_BT, BATCH["logp"], BATCH["mask"])
    rest = BATCH["old_logp"], BATCH["ref_logp"], adv_BT, BATCH["mask"]

    def loss_of(logp_BT):
        return objectives.loss(obj, logp_BT, *rest, max_completion_length=budget, penalised_BT=penalised_BT)[0]

    loss, grad_BT = jax.value_and_grad(loss_of)(BATCH["logp"])
    close(grad_BT, theirs["gradient"])
    if obj.surrogate.startswith("trust_region") and framework != "verl":
        return
    scale = np.abs(theirs["gradient"]).sum()
    np.testing.assert_allclose(float(loss), theirs["loss"], rtol=1e-6, atol=1e-6 * scale)


# Ours, and what theirs is of it. verl's "gpg" scales by rows over rows with a reward, not by groups: compared without it.
VERLS_ADVANTAGES = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("dr_grpo", {}),
    "pass_at_k": ("pass_at_k", {}),
    "rloo": ("rloo", {}),
    "opo": ("opo", {}),
    # It adds 1e-8 to the variance, where ours adds adv_eps to the std.
    "reinforce_pp_baseline": ("reinforce_pp_baseline", {"adv_eps": 0.0}),
    "gpg": ("gpg", {}),
}
TUNIXS_ADVANTAGES = {"grpo": ("grpo", {}), "dr_grpo": ("dr_grpo", {}), "rloo": ("rloo", {})}
SKYRLS_ADVANTAGES = {"grpo": ("grpo", {}), "dr_grpo": ("dr_grpo", {}), "rloo": ("rloo", {}), "maxrl": ("maxrl", {})}


@pytest.mark.parametrize(
    ("numbers", "name", "variant", "fields"),
    [
        *((VERL, name, *ours) for name, ours in VERLS_ADVANTAGES.items()),
        *((SKYRL, name, *ours) for name, ours in SKYRLS_ADVANTAGES.items()),
        *((TUNIX, name, *ours) for name, ours in TUNIXS_ADVANTAGES.items()),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_advantages_are_theirs(numbers, name, variant, fields):
    obj, theirs = objectives.get(variant, **fields), np.asarray(numbers["advantages"][name]["values"])
    rewards_B = BATCH["rewards"].sum(1)
    adv_BT = objectives.advantages(obj, rewards_B, BATCH["mask"], BATCH["entropy"], group_size=numbers["group_size"])
    if theirs.ndim == 1:  # Tunix's: one a row
        adv_BT = adv_BT[:, 0]
    else:
        adv_BT = np.broadcast_to(adv_BT, theirs.shape) * np.asarray(BATCH["mask"])
    if name == "gpg":
        adv_BT, theirs = adv_BT / np.abs(adv_BT).max(), theirs / np.abs(theirs).max()
    if name == "maxrl":  # SkyRL adds 1e-6 to the mean that the paper divides by
        mean_P = np.asarray(rewards_B).reshape(-1, numbers["group_size"]).mean(1)
        theirs = theirs * (1 + 1e-6 / mean_P).repeat(numbers["group_size"])[:, None]
    close(adv_BT, theirs)
