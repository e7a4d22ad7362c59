"""A choice of one's own on every axis, from a folder outside the clone, by name or as a function, with numbers of its own."""

import hashlib
import math
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import objectives
from grpo_jax.config import parse_config
from grpo_jax.errors import UserError
from grpo_jax.learner.hyperparams import hyperparams_of, static_key, with_hyperparams
from grpo_jax.objectives.params import Params
from grpo_jax.tools import cli
from grpo_jax.tools.sweep.plan import apply_changes
from grpo_jax.training.build import sources_of
from tests.test_config import raw_config
from tests.test_objectives import BUDGET, B, G, P, T, assert_close, f32, loss_and_grad, make_batch

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = '''
import jax.numpy as jnp

RATE = 1.0


def mad(obj, groups):
    """Deviation from the median over the median absolute deviation of the group."""
    reward_PG = groups.reward_PG
    off_PG = reward_PG - jnp.median(reward_PG, 1, keepdims=True)
    return (off_PG / (jnp.median(jnp.abs(off_PG), 1, keepdims=True) + 0.1))[..., None]


def smooth_clip(obj, terms):
    """A (1 + k tanh((w - 1) / k)): PPO's clip without its corners."""
    k, step_BT = obj.params["width"], terms.ratio_BT - 1
    return terms.adv_BT * (1 + k * jnp.tanh(step_BT / k)), step_BT < -k, step_BT > k


def whole_row(obj, log_ratio_BT, mask_BT):
    return jnp.broadcast_to(jnp.exp(log_ratio_BT.sum(-1, keepdims=True)), mask_BT.shape)


whole_row.is_per_row = True


def mean_of_roots(obj, mask_BT, max_completion_length):
    return mask_BT / jnp.sqrt(jnp.maximum(mask_BT.sum(-1, keepdims=True), 1)), mask_BT.any(-1).sum()


def absolute(obj, logp_BT, ref_logp_BT, mask_BT):
    return jnp.where(mask_BT > 0, jnp.abs(logp_BT - ref_logp_BT), 0.0)


def one_argument(obj):
    return 0.0


def wrong_shape(obj, groups):
    return groups.reward_PG[0]
'''


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working directory, which holds a module of one's own."""
    folder, before = tmp_path_factory.mktemp("mine"), os.getcwd()
    (folder / "my_choices.py").write_text(SOURCE)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.chdir(before)


def smooth_clip_in_float64(batch, adv_BT, k):
    """Loss and gradient of the clip above under token_mean, number by number."""
    loss, grad_BT, num = 0.0, np.zeros((B, T)), batch.mask_BT.sum()
    for i, t in zip(*np.nonzero(batch.mask_BT), strict=True):
        w, A = math.exp(float(batch.logp_BT[i, t]) - float(batch.old_BT[i, t])), float(adv_BT[i, t])
        loss -= A * (1 + k * math.tanh((w - 1) / k)) / num
        grad_BT[i, t] = -A * (1 - math.tanh((w - 1) / k) ** 2) * w / num
    return loss, grad_BT


@pytest.mark.parametrize("width", [0.2, 1])
def test_a_clip_of_ones_own_with_its_hyperparameter(width):
    obj = objectives.get("dapo", surrogate="my_choices:smooth_clip", params={"width": width})
    batch = make_batch(seed=3)
    expected, expected_grad_BT = smooth_clip_in_float64(batch, batch.token_adv_BT, width)
    loss, grad_BT = loss_and_grad(obj, batch, batch.token_adv_BT)
    assert abs(expected) > 1e-3
    assert_close(loss, expected)
    assert_close(grad_BT, expected_grad_BT)


def test_every_axis_takes_a_function():
    import my_choices

    batch = make_batch(seed=4, rewards="graded")
    arrays = f32(batch.logp_BT), f32(batch.old_BT), f32(batch.ref_BT)
    mask_BT, rewards_B = f32(batch.mask_BT), f32(batch.rewards_B)
    named, given = (
        objectives.get("grpo", **{field: choice for field, choice in choices.items()})
        for choices in (
            {
                "advantage": "my_choices:mad",
                "ratio": "my_choices:whole_row",
                "aggregation": "sequence_sum",
                "kl_estimator": "my_choices:absolute",
            },
            {
                "advantage": my_choices.mad,
                "ratio": my_choices.whole_row,
                "aggregation": "sequence_sum",
                "kl_estimator": my_choices.absolute,
            },
        )
    )
    assert hash(given) and given.to_dict() == named.to_dict()
    for obj in (named, given):
        adv_BT = objectives.advantages(obj, rewards_B, mask_BT, group_size=G)
        rewards_PG = np.asarray(rewards_B, np.float64).reshape(P, G)
        off_PG = rewards_PG - np.median(rewards_PG, 1, keepdims=True)
        expected_PG = off_PG / (np.median(np.abs(off_PG), 1, keepdims=True) + 0.1)
        assert_close(adv_BT, expected_PG.reshape(B, 1) * batch.mask_BT)
        loss_BT, aux = objectives.token_loss(obj, *arrays, adv_BT, mask_BT)
        log_w_B = ((batch.logp_BT.astype(np.float64) - batch.old_BT) * batch.mask_BT).sum(1)
        assert_close(aux["ratio"], np.exp(log_w_B)[:, None] * np.ones((1, T)))
        weight_BT, denom = objectives.weights(obj, mask_BT, max_completion_length=BUDGET)
        assert_close(weight_BT, batch.mask_BT)
        assert float(denom) == batch.mask_BT.any(1).sum()
        kl_BT = np.abs(batch.logp_BT - batch.ref_BT) * batch.mask_BT
        clipped_B1 = np.clip(np.exp(log_w_B), 0.8, 1.2)[:, None]
        value_BT = np.minimum(np.exp(log_w_B)[:, None] * np.asarray(adv_BT), clipped_B1 * np.asarray(adv_BT))
        assert_close(loss_BT, 0.04 * kl_BT - value_BT)
    rooted = objectives.get("grpo", aggregation="my_choices:mean_of_roots")
    weight_BT, _ = objectives.weights(rooted, mask_BT, max_completion_length=BUDGET)
    assert_close(weight_BT, batch.mask_BT / np.sqrt(np.maximum(batch.mask_BT.sum(1, keepdims=True), 1)))


def test_its_numbers_are_data_of_the_program():
    """One program for all widths, and widths side by side under vmap."""
    configs = [
        parse_config(with_own_clip({"objective.params.width": width, "objective.params.unused": 1})) for width in (0.2, 0.5)
    ]
    assert static_key(configs[0]) == static_key(configs[1]) != configs[0]
    other = parse_config(with_own_clip({"objective.params.width": 0.2}))
    assert static_key(other) != static_key(configs[0]), "names decide what a function may read"
    batch, traces = make_batch(seed=3), []
    arrays = f32(batch.logp_BT), f32(batch.old_BT), None, f32(batch.token_adv_BT), f32(batch.mask_BT)

    def loss_of(hyperparams):
        traces.append(1)
        obj = with_hyperparams(static_key(configs[0]).objective, hyperparams)
        return objectives.loss(obj, *arrays, max_completion_length=BUDGET)[0]

    numbers = [hyperparams_of(config) for config in configs]
    jitted = jax.jit(loss_of)
    alone = [float(jitted(each)) for each in numbers]
    assert len(traces) == 1
    for width, loss in zip((0.2, 0.5), alone, strict=True):
        assert_close(loss, smooth_clip_in_float64(batch, batch.token_adv_BT, width)[0])
    together = jax.vmap(loss_of)(jax.tree.map(lambda *each: jnp.stack(each), *numbers))
    assert_close(together, alone)


def with_own_clip(changes):
    raw = raw_config("dapo", "runlocal").to_dict()
    raw["objective"]["surrogate"] = "my_choices:smooth_clip"
    for field, value in changes.items():
        raw["objective"]["params"][field.rpartition(".")[2]] = value
    return raw


def test_a_sweep_varies_them():
    raw = with_own_clip({})
    config = apply_changes(raw, {"objective.params.width": 0.4}, "here")
    assert config.objective.params == {"width": 0.4}
    assert parse_config(config.to_dict()) == config
    with pytest.raises(UserError, match=r"here: 'objective.parms.width' is no field"):
        apply_changes(raw, {"objective.parms.width": 0.4}, "here")


@pytest.mark.parametrize("written", [{"width": 0.4}, '{"width": 0.4}'])
def test_a_config_has_them_as_a_mapping_or_as_json(written):
    raw = with_own_clip({})
    raw["objective"]["params"] = written
    assert parse_config(raw).objective.params == Params({"width": 0.4})


@pytest.mark.parametrize(
    ("flags", "params"),
    [
        (["--config.objective.params.width=0.4", "--config.objective.params.k=2"], {"width": 0.4, "k": 2}),
        (['--config.objective.params={"width": 0.4}'], {"width": 0.4}),
        (["--config.objective.ratio=token"], {}),
    ],
)
def test_flags_name_them(flags, params):
    found, rest = cli._split_free_fields(["train", "--config=dapo", *flags])
    assert found.get("objective", {}) == params and len(rest) == 2 + (not params)


@pytest.mark.parametrize("flag", [f"--config.objective.params{rest}" for rest in (".width=wide", ".width", "=3")])
def test_a_flag_that_is_no_number_says_how_to_write_it(flag):
    with pytest.raises(UserError, match=r"write --config.objective.params.NAME=0.3 or"):
        cli._split_free_fields([flag])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"advantage": "nowhere:mad"}, r"objective.advantage = 'nowhere:mad': no module 'nowhere' .* function \(obj, groups\)"),
        ({"surrogate": "my_choices:mud"}, r"module 'my_choices' has no 'mud'; it must be a function \(obj, terms\)"),
        ({"surrogate": "my_choices:RATE"}, r"not a function; it must be one \(obj, terms\)"),
        ({"advantage": "my_choices:one_argument"}, r"cannot be called with \(obj, groups\), too many positional arguments"),
        ({"advantage": "my_choices:wrong_shape"}, r"called as \(obj, groups\) it raised"),
        ({"surrogate": "my_choices:smooth_clip"}, r"objective.params.width is not set; set are: none"),
        ({"params": {"the width": 1.0}}, r"objective.params: 'the width' cannot be a name"),
        ({"params": {"width": math.nan}}, r"objective.params.width = nan: must be a finite number"),
        ({"params": {"width": "wide"}}, r"objective.params.width = 'wide': must be a finite number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields, says):
    with pytest.raises((ValueError, TypeError), match=says) as error:
        objectives.get("grpo", **fields) if "params" not in fields else Params(fields["params"])
    assert "\n" not in str(error.value)
    raw = raw_config("grpo", "runlocal").to_dict()
    raw["objective"].update(fields)
    with pytest.raises(UserError, match=r"^config\.objective\.\w+"):
        parse_config(raw)


def test_the_source_is_recorded_by_its_hash(folder):
    obj = objectives.get("grpo", advantage="my_choices:mad", surrogate="my_choices:smooth_clip", params={"width": 0.2})
    digest = hashlib.sha256((folder / "my_choices.py").read_bytes()).hexdigest()
    assert objectives.sources(obj) == {"my_choices:mad": digest, "my_choices:smooth_clip": digest}
    assert objectives.sources(objectives.get("gtpo")) == {}
    config = parse_config(with_own_clip({"objective.params.width": 0.2}))
    assert sources_of(config) == {"my_choices:smooth_clip": digest}, "a run compares it with what it began with"
    cell, hashes = {}, set()
    for factor in (1, 2):
        exec(f"def mine(obj, groups):\n    return {factor} * groups.reward_PG[..., None]", cell)  # a cell has no file
        hashes |= set(objectives.sources(objectives.get("grpo", advantage=cell["mine"])).values())
    assert len(hashes) == 2


def test_an_advantage_of_ones_own_that_needs_entropy_fails_without_it():
    """Nothing silent: an entropy that was not given is None, not ones."""
    obj = objectives.get("grpo", advantage=lambda obj, groups: groups.entropy_PGT * groups.reward_PG[..., None])
    batch = make_batch()
    with pytest.raises(TypeError):
        objectives.advantages(obj, f32(batch.rewards_B), f32(batch.mask_BT), None, group_size=G)
    assert np.asarray(
        objectives.advantages(obj, f32(batch.rewards_B), f32(batch.mask_BT), f32(batch.entropy_BT), group_size=G)
    ).any()


@pytest.mark.slow
def test_a_run_from_another_folder_takes_it(folder):
    """As a command, with the clone elsewhere and the working directory not on the path."""
    code = "import sys; sys.path = [p for p in sys.path if p]; from grpo_jax.tools import main; main.main()"
    command = [sys.executable, "-P", "-c", textwrap.dedent(code), "train", "--config=grpo:runlocal", "--workdir=w"]
    command += ["--config.objective.surrogate=my_choices:smooth_clip", "--config.objective.params.width=0.3"]
    command += ["--config.num_steps=1", "--config.warm_start.num_steps=2", "--config.eval_every=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert '"width": 0.3' in (folder / "w" / "config.json").read_text()
