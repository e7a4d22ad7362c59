"""What the wider family needs of the train step: filters over the global batch, parts of a reward, the entropy's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import objectives
from grpo_jax.config import parse_config
from grpo_jax.configs import variant
from grpo_jax.errors import UserError
from grpo_jax.learner.hyperparams import with_fields
from grpo_jax.objectives.ratios import is_per_row
from grpo_jax.training.run import make_run
from tests import tiny
from tests.test_train_step import BIGRAM, BUDGET, SAMPLING, G, T, batch_of, floats, moved, on_policy, spec_of, start, step_of

ACTIVE = {
    "clip_cov": {"cov_share": 0.1, "cov_range": (0.1, 3.0)},
    "kl_cov": {"cov_share": 0.1},
    "gfpo": {"keep_rows": 2},
    "entropy_bonus": {"entropy_coef": 0.5},
    "deepseek_v32": {"max_off_policy_kl": 0.05},
}


def dense(params, rollout):
    """(logp, entropy) of the bigram by a dense softmax."""
    decoder = BIGRAM.bind(params)
    tokens_BT, mask_BT = rollout.tokens_PGT.reshape(-1, T), rollout.mask_PGT.reshape(-1, T)
    last_PD, hidden_BTD, _ = decoder.forward_with_prefix(rollout.prompts.tokens_PS, rollout.prompts.mask_PS, tokens_BT, mask_BT)
    hidden_BTD = jnp.concatenate([jnp.repeat(last_PD, G, 0)[:, None], hidden_BTD[:, :-1]], 1)
    log_p_BTV = jax.nn.log_softmax(hidden_BTD @ decoder.head_VD.T / SAMPLING.temperature)
    logp_BT = jnp.take_along_axis(log_p_BTV, tokens_BT[..., None], -1)[..., 0]
    return logp_BT, -(jnp.exp(log_p_BTV) * log_p_BTV).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["entropy_bonus", "kl_cov", "clip_cov", "forking_tokens", "gdpo", "gfpo", "deepseek_v32", "luspo"]
)
def test_the_update_is_the_objective_written_out(name):
    """On 8 devices in two microbatches each, against the whole batch at once."""
    spec = with_fields(spec_of(name, num_microbatches=2), {f"objective.{k}": v for k, v in ACTIVE.get(name, {}).items()})
    batch, state, obj = batch_of(), start(spec), spec.objective
    rollout = batch.rollout
    rows = [x.reshape(-1, T) for x in (rollout.mask_PGT, rollout.sampler_logp_PGT, rollout.entropy_PGT)]
    mask_BT, old_BT, entropy_BT = rows
    reward_B, task_B = batch.reward_PG.reshape(-1), batch.task_reward_PG.reshape(-1)
    parts_BK = jnp.stack([task_B, reward_B - task_B], 1)
    kwargs = {"task_rewards_B": task_B, "reward_parts_BK": parts_BK, "logp_BT": old_BT}
    adv_BT = objectives.advantages(obj, reward_B, mask_BT, entropy_BT, group_size=G, **kwargs)
    penalised_BT = objectives.penalised_tokens(obj, adv_BT, old_BT, mask_BT)

    def loss_of(params):
        logp_BT, entropy_BT = dense(params, rollout)
        ref_BT = dense(state.ref_params, rollout)[0] if obj.needs_reference else None
        extra = {"entropy_BT": entropy_BT, "penalised_BT": penalised_BT}
        return objectives.loss(obj, logp_BT, old_BT, ref_BT, adv_BT, mask_BT, max_completion_length=BUDGET, **extra)[0]

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(state.params)
    after, metrics = step_of(spec, num_devices=8)(state, batch)
    values = floats(metrics)
    np.testing.assert_allclose(values["loss/total"], loss, rtol=1e-5, atol=1e-6)
    assert tiny.largest_difference(moved(state, after), jax.tree.map(jnp.negative, grads)) < 1e-5
    silent = float(((np.asarray(adv_BT) == 0) * mask_BT).sum() / mask_BT.sum())
    assert values["advantage/silent"] == pytest.approx(silent, rel=1e-6)
    if name == "kl_cov":
        assert values["policy/penalised_fraction"] == pytest.approx(float(penalised_BT.sum() / mask_BT.sum()), rel=1e-5)
    assert (values.get("policy/off_policy_fraction", 0) > 0) == (name == "deepseek_v32")


@pytest.mark.slow
@pytest.mark.parametrize(("level", "outside"), [("sequence", "mask"), ("sequence_geometric", "truncate"), ("token", "mask")])
def test_the_correction_of_the_sampler_weighs_the_policy_loss(level, outside):
    """IcePop and MIS: the gradient under the weights of `sampler_weights`, KL and denominators untouched."""
    spec = spec_of("dapo", old_logp="learner")
    changes = {"importance_cap": 1.5, "importance_floor": 0.6, "importance_level": level, "importance_outside": outside}
    corrected = with_fields(spec, {f"learner.{field}": value for field, value in changes.items()})
    state = start(spec)
    batch = on_policy(batch_of(), state.params)
    rollout, mask_PGT = batch.rollout, batch.rollout.mask_PGT
    log_weight_PGT = 0.4 * jnp.asarray(np.random.default_rng(0).normal(size=mask_PGT.shape), jnp.float32)
    skewed = tiny.with_rollout(batch, sampler_logp_PGT=rollout.sampler_logp_PGT - log_weight_PGT)
    ratio_PGT = objectives.sampler_ratio(log_weight_PGT * mask_PGT, mask_PGT, level)
    weight_BT = objectives.sampler_weights(ratio_PGT, outside, 0.6, 1.5).reshape(-1, T)
    mask_BT = mask_PGT.reshape(-1, T)
    rewards = batch.reward_PG.reshape(-1), mask_BT
    adv_BT = objectives.advantages(spec.objective, *rewards, group_size=G)

    def loss_of(params):
        return -(mask_BT * adv_BT * weight_BT * dense(params, rollout)[0]).sum() / mask_BT.sum()

    after, metrics = step_of(corrected)(state, skewed)
    grads = jax.jit(jax.grad(loss_of))(state.params)
    assert tiny.largest_difference(moved(state, after), jax.tree.map(jnp.negative, grads)) < 1e-5
    outside_BT = ((np.asarray(ratio_PGT) > 1.5) | (np.asarray(ratio_PGT) < 0.6)).reshape(-1, T)
    share = float((mask_BT * outside_BT).sum() / mask_BT.sum())
    assert 0.05 < share < 0.95
    assert floats(metrics)["policy/importance_capped"] == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("name", objectives.FAMILY)
def test_every_config_of_the_family_is_valid(name):
    config = parse_config(variant.get_config(f"{name},runlocal"))
    assert config.objective == objectives.get(name)
    assert not is_per_row(config.objective) or config.objective.aggregation in ("sequence_mean", "sequence_sum")


@pytest.mark.slow
def test_every_config_of_the_family_fits_together():
    """At the smallest scale, traced through rollout and update."""
    for name in ("kl_cov", "entropy_bonus"):
        raw = variant.get_config(f"{name},runlocal")
        raw.update_from_flattened_dict({"warm_start.num_steps": 0, "mesh.data": 1, "learner.num_minibatches": 2})
        run = make_run(parse_config(raw))
        state = jax.eval_shape(lambda run=run: run.initial_state())
        after, _, metrics = jax.eval_shape(run.iterate, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert {"loss/total", "policy/ratio", "advantage/silent"} < set(metrics)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"objective.row_filter": "shortest", "objective.keep_rows": 8},
            r"keep_rows = 8: must be below config.rollout.group_size",
        ),
        ({"objective.advantage": "pass_at_k_analytic", "objective.pass_k": 9}, r"pass_k = 9: must be at most"),
        ({"objective.advantage": "reward_parts", "objective.part_weights": (1.0,)}, r"part_weights = \(1.0,\): two numbers"),
        ({"learner.importance_level": "sequence"}, r"importance_cap = 0: with it importance_floor"),
        ({"overlong.easy_share": 0.3}, r"overlong.easy_share = 0.3: at least 0.5, or 0 for no GROP"),
        ({"overlong.easy_share": 0.7, "overlong.cache_share": 0.2}, r"GROP takes the place of DAPO's punishment"),
    ],
)
def test_settings_that_do_nothing_are_refused(changes, says):
    raw = variant.get_config("grpo,runlocal")
    with raw.unlocked():
        raw.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=says):
        parse_config(raw)
