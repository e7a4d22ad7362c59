"""The embedded tasks of long answers: every reward against a plain Python judge, and the credit of `forks` by enumeration."""

import dataclasses
import functools
import itertools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.tasks import credit as credit_study
from experiments.studies.tasks import gradient_noise
from grpo_jax import objectives
from grpo_jax.config import ForksConfig, parse_config
from grpo_jax.config.embedded import EMBEDDED
from grpo_jax.configs import base
from grpo_jax.errors import UserError
from grpo_jax.learner.advantage_diagnostics import advantage_metrics, batch_advantages, trained_mask
from grpo_jax.metrics import to_floats
from grpo_jax.tasks.embedded import TABLE_TASKS, make_embedded, tokenizer_of
from grpo_jax.tasks.forks import BRANCHES, FILLERS, filler_shares
from grpo_jax.tasks.maze import CELLS
from grpo_jax.training import build, trainer
from grpo_jax.training import run as run_lib
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.types import UNKNOWN, Batch, Rollout
from tests import programs

NAMES = tuple(TABLE_TASKS)
each_task = pytest.mark.parametrize("name", NAMES)


def config_of(name, scale="tiny", variant="grpo", **changes):
    raw = base.get_config(scale, variant)
    raw.update_from_flattened_dict({"task.name": name, "mesh.data": 1, **changes})
    return parse_config(raw)


@functools.cache
def task_of(name, **changes):
    config = config_of(name, **changes)
    return make_embedded(config, tokenizer_of(config))


def completions(task, texts, width):
    """Texts -> tokens and mask [P, 1, T], each ended by a stop token; those ending in "~" are cut off instead."""
    tokens, mask = np.zeros((len(texts), 1, width), np.int32), np.zeros((len(texts), 1, width), np.float32)
    for row, text in enumerate(texts):
        ids = task.tokenizer.encode(text.removesuffix("~"))
        ids += [] if text.endswith("~") else [task.stop_ids[0]]
        tokens[row, 0, : len(ids)], mask[row, 0, : len(ids)] = ids, 1
    return tokens, mask


def rewards_of(task, rows, texts, width=64):
    return np.asarray(jax.jit(task.reward)(jnp.asarray(rows), *completions(task, texts, width)).task_PG)[:, 0]


def is_right_chain(question, text):
    return text.endswith("=" + str(sum(map(int, question[:-1].split("+"))))) and "~" not in text


def is_right_countdown(question, text):
    numbers, target = question.split(":")
    there = sorted(map(int, numbers.split(",")))
    steps = text.split(",")
    for step in steps:
        found = re.fullmatch(r"(\d\d)([+-])(\d\d)=(\d\d)", step)
        if not found:
            return False
        left, right, result = int(found[1]), int(found[3]), int(found[4])
        if result != (left + right if found[2] == "+" else left - right):
            return False
        for number in (left, right):
            if number not in there:
                return False
            there.remove(number)
        there.append(result)
    return there == [int(target)]


def is_right_maze(question, text, side=5):
    walls, (here, goal) = question.split(":")
    if not text or "~" in text:
        return False
    for cell in text:
        if cell == ":" or cell in walls or CELLS.index(cell) >= side**2:
            return False
        (a, b), (c, d) = divmod(CELLS.index(here), side), divmod(CELLS.index(cell), side)
        if abs(a - c) + abs(b - d) != 1:
            return False
        here = cell
    return here == goal


def is_right_forks(question, text, filler=6):
    told = text[filler :: filler + 1]
    return told[: len(question) - 1] == "".join(BRANCHES[int(x) % 2] for x in question[:-1])


JUDGES = {"chain": is_right_chain, "countdown": is_right_countdown, "maze": is_right_maze, "forks": is_right_forks}


@each_task
def test_the_reward_is_that_of_a_plain_judge(name):
    """Right and careless answers, and each with one sign changed, left out or put in."""
    task, rng = task_of(name), random.Random(1)
    rows, texts = [], []
    for row in range(300):
        text = task.teach(task._problems[row], rng, rng.choice((0.0, 1.0)))
        place, sign = rng.randrange(len(text)), rng.choice(task.alphabet)
        changed = (
            text[:place] + sign + text[place + 1 :],
            text[:place] + text[place + 1 :],
            text[:place] + sign + text[place:],
        )
        rows += [row] * 6
        texts += [text, *changed, text[:place], text + "~"]
    expected = [JUDGES[name](task.question(task._problems[row]), text) for row, text in zip(rows, texts, strict=True)]
    if name == "forks":  # what stands behind the last fork does not matter, nor that nothing ends there
        expected = [
            JUDGES[name](task.question(task._problems[row]), text.rstrip("~")) for row, text in zip(rows, texts, strict=True)
        ]
    assert 0.05 < np.mean(expected) < 0.6
    np.testing.assert_array_equal(rewards_of(task, rows, texts), np.asarray(expected, np.float32))


@each_task
def test_held_out_problems_are_never_trained_on_and_the_same_for_every_seed(name):
    task, other = task_of(name), task_of(name, seed=5)
    held_out, drawn = task.eval_prompts(), task.train_prompts(0, 4096)
    texts = {task.tokenizer.decode(row) for row in np.asarray(held_out.tokens_PS)}
    assert len(texts) == len(held_out.answer) == 512
    assert not texts & {task.tokenizer.decode(row) for row in np.asarray(drawn.tokens_PS)}
    assert len(set(np.asarray(drawn.answer).tolist())) > 300
    jax.tree.map(np.testing.assert_array_equal, held_out, other.eval_prompts())
    assert (np.asarray(other.train_prompts(0, 8).answer) != np.asarray(drawn.answer[:8])).any()
    # A pure function of the number and the seed, which may be traced.
    again = jax.jit(lambda position, seed: task.train_prompts(position, 5, seed))(7, 5)
    np.testing.assert_array_equal(again.answer, other.train_prompts(0, 12).answer[7:])


@each_task
def test_lessons_are_right_as_often_as_the_noise_says(name):
    task = task_of(name)
    shares = {}
    for noise in (0.0, 0.8):
        prompts, tokens, mask = task.supervised(jax.random.key(3), 2000, noise)
        assert (np.asarray(prompts.answer) >= 512).all()
        assert (np.asarray(tokens)[..., 0] != task.stop_ids[0]).all() and mask.shape == tokens.shape
        last = np.take_along_axis(np.asarray(tokens), np.asarray(mask, int).sum(-1, keepdims=True) - 1, -1)
        assert (last == task.stop_ids[0]).all(), "each ends with the stop token"
        shares[noise] = float(task.reward(prompts.answer, tokens, mask).task_PG.mean())
    assert shares[0.0] == 1.0
    assert 0.1 <= shares[0.8] <= 0.7


@each_task
def test_an_answer_fits_the_budget_with_room_for_a_quarter(name):
    """Also at other sizes; DAPO's punishment begins at three quarters of the budget."""
    sizes = {
        "chain": {"num_terms": 9, "max_term": 33},
        "countdown": {"num_numbers": 5, "max_number": 15},
        "maze": {"side": 4, "num_walls": 3, "min_distance": 2},
        "forks": {"num_forks": 2, "filler_tokens": 0},
    }
    for changes in ({}, {f"task.{name}.{field}": value for field, value in sizes[name].items()}):
        config = config_of(name, **{"eval.num_prompts": 32, **changes})
        task = make_embedded(config, tokenizer_of(config))
        rng = random.Random(0)
        lengths = [len(task.teach(problem, rng, noise)) + 1 for problem in task._problems[:500] for noise in (0.0, 1.0)]
        longest = getattr(config.task, name).longest_answer
        assert 0.6 * longest <= max(lengths) <= longest <= 0.75 * config.rollout.max_completion_tokens


def test_each_task_decides_its_steps_and_tokens_unless_they_are_set(caplog):
    with caplog.at_level("INFO", "grpo_jax"):
        decided = config_of("chain")
    assert decided.rollout.max_completion_tokens == 50 and decided.num_steps == 100
    assert "task 'chain' decides config.num_steps = 100" in caplog.text
    own = config_of("chain", num_steps=7, **{"warm_start.num_steps": 0, "rollout.max_completion_tokens": 40})
    assert (own.num_steps, own.warm_start.num_steps, own.rollout.max_completion_tokens) == (7, 0, 40)
    sums = config_of("arithmetic")
    assert (sums.num_steps, sums.warm_start.num_steps, sums.rollout.max_completion_tokens) == (800, 1200, 6)
    assert parse_config(decided.to_dict()) == decided
    assert len({config_of(name).rollout.max_completion_tokens for name in EMBEDDED}) == 5


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        (
            "chain",
            {"rollout.max_completion_tokens": 20},
            r"config\.rollout\.max_completion_tokens = 20: the longest answer .* 37",
        ),
        (
            "forks",
            {"task.forks.num_forks": 1, "eval.num_prompts": 6},
            r"config\.eval\.num_prompts = 6: .* half of the 10 problems",
        ),
        ("maze", {"task.maze.num_walls": 13}, r"config\.task\.maze\.num_walls = 13"),
        ("countdown", {"task.countdown.max_number": 50}, r"config\.task\.countdown\.max_number = 50: 3 of them"),
        ("forks", {"model.path": "somewhere"}, r"config\.model\.path = 'somewhere': task 'forks' is written in signs"),
        ("chain", {"reward.task": "exact"}, r"config\.reward\.task = 'exact': task 'chain' has a reward of its own"),
        ("chain", {"task.num_shots": 2}, r"config\.task\.num_shots = 2: task 'chain' has none; leave"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(name, changes, says):
    with pytest.raises(UserError, match=says):
        build.make_task(config_of(name, **changes))


def test_fillers_have_the_entropy_that_is_asked_for():
    for entropy in (0.0, 0.3, 1.0, 1.7, 2.0794):
        shares = np.asarray(filler_shares(entropy))
        assert shares.sum() == pytest.approx(1) and len(shares) == len(FILLERS)
        assert -(shares[shares > 0] * np.log(shares[shares > 0])).sum() == pytest.approx(entropy, abs=1e-4)


def forks_of(k, filler, num_eval=2):
    config = ForksConfig(num_forks=k, filler_tokens=filler)
    return TABLE_TASKS["forks"](config, seed=0, num_eval=num_eval, max_answer_tokens=k * (filler + 1) + 3)


def test_credit_is_the_advantage_of_every_token_by_enumeration():
    """Q - V, from the success of all continuations weighed by their probability, in float64."""
    k, filler = 3, 1
    task, rng = forks_of(k, filler), np.random.default_rng(0)
    p_K = rng.uniform(0.1, 0.9, k)  # of the right branch
    row = 4
    right_K = [int(x) % 2 for x in task._problems[row]]
    texts, branches = [], list(itertools.product((0, 1), repeat=k))
    for taken in branches:
        texts.append("".join(f"a{BRANCHES[branch]}" for branch in taken))
    tokens, mask = completions(task, texts, 8)
    logp = np.log(0.25) * np.ones(tokens.shape)
    for number, taken in enumerate(branches):
        for j, branch in enumerate(taken):
            logp[number, 0, task.places[j]] = np.log(p_K[j] if branch == right_K[j] else 1 - p_K[j])
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # jax 0.7
    with enable_x64(True):
        credit = np.asarray(task.token_credit(np.full(len(texts), row), tokens, mask, logp))[:, 0]
    assert credit.dtype == np.float64

    def value(done):
        """Success after these branches, over all ways to go on."""
        total = 0.0
        for rest in itertools.product((0, 1), repeat=k - len(done)):
            taken = [*done, *rest]
            chance = np.prod([p_K[j] if taken[j] == right_K[j] else 1 - p_K[j] for j in range(len(done), k)])
            total += chance * (taken == right_K)
        return total

    for number, taken in enumerate(branches):
        expected = np.zeros(8)
        for j in range(k):
            expected[task.places[j]] = value(list(taken[: j + 1])) - value(list(taken[:j]))
        np.testing.assert_allclose(credit[number], expected, atol=1e-14)
        assert credit[number].sum() == pytest.approx((list(taken) == right_K) - p_K.prod(), abs=1e-14)


def test_entropy_tells_forks_from_filler_only_beside_the_rest_of_a_row():
    """Rows of a group have the same entropy at a position of filler: normalised by it, GTPO's credit knows nothing of it."""
    found = {}
    for entropy in (0.0, 1.0):
        draw = credit_study.sample(ForksConfig(filler_entropy=entropy), 0.8, 64, 8, seed=0)
        for name in ("grpo", "gtpo", "gtpo_geometric"):
            found[name, entropy] = credit_study.correlation(name, *draw)
    assert found["gtpo", 0.0] == pytest.approx(found["gtpo", 1.0], abs=0.02)
    assert found["gtpo_geometric", 0.0] > 0.6 > 0.3 > found["grpo", 1.0] > found["gtpo_geometric", 1.0]


def test_signal_and_noise_are_those_of_the_sample_covariance():
    g_NX = np.random.default_rng(2).normal(0.3, 1.0, (12, 5))
    signal, noise = gradient_noise.signal_and_noise(np.square(g_NX.sum(0)).sum(), np.square(g_NX).sum(), 12)
    products = g_NX @ g_NX.T
    assert signal == pytest.approx(products[~np.eye(12, dtype=bool)].mean())
    assert noise == pytest.approx(np.trace(np.cov(g_NX, rowvar=False)))


def test_credit_of_a_completion_that_ends_too_early_is_unknown():
    task = forks_of(2, 1)
    tokens, mask = completions(task, ["aLaL", "aLa", "aL"], 6)
    credit = np.asarray(task.token_credit(np.full(3, 5), tokens, mask, np.full(tokens.shape, -0.5)))[:, 0]
    # The second one's stop token stands where the last fork does: a wrong branch like any other.
    assert (abs(credit[:2]) <= 1).all() and (credit[2] == np.float32(UNKNOWN)).all()
    assert (credit[:2][:, [0, 2, 4, 5]] == 0).all()


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo", "gtpo", "grpo_s"])
def test_the_recorded_correlation_is_that_of_the_updates_advantages_with_true_credit(variant):
    """Against NumPy in float64; one row ends too early, another has no score."""
    k, filler, P, G = 3, 2, 6, 4
    task, rng = forks_of(k, filler), np.random.default_rng(3)
    T = k * (filler + 1) + 1
    prompts = task.train_prompts(0, P)
    texts = ["".join("ab" + rng.choice(list(BRANCHES)) for _ in range(k)) for _ in range(P * G)]
    texts[5] = "abL"
    tokens, mask = (x.reshape(P, G, T) for x in completions(task, texts, T))
    logp = -rng.uniform(0.05, 2.0, (P, G, T)).astype(np.float32)
    entropy = rng.uniform(0.1, 2.0, (P, G, T)).astype(np.float32) * mask
    reward_PG = task.reward(prompts.answer, tokens, mask).task_PG
    reward_PG = reward_PG.at[:, 0].set(1.0)  # some of each, where chance gave few
    rollout = Rollout(
        prompts, tokens, jnp.asarray(mask), jnp.asarray(logp), jnp.asarray(entropy), None, jnp.zeros((P, G), bool)
    )
    credit = task.token_credit(prompts.answer, tokens, mask, logp)
    is_scored = jnp.ones((P, G), bool).at[2, 1].set(False)
    batch = Batch(rollout, reward_PG, reward_PG, jnp.zeros(P, jnp.int32), is_scored, credit)
    obj, mask_PGT = objectives.get(variant), trained_mask(batch, False)
    adv = batch_advantages(obj, batch, mask_PGT, rollout.entropy_PGT)
    found = to_floats(advantage_metrics(obj, batch, mask_PGT, adv))["advantage/credit_correlation"]
    counts = (np.asarray(mask_PGT) > 0) & (np.asarray(credit) >= -1)
    assert 0 < counts.sum() < mask.sum() - 3
    expected = np.corrcoef(np.asarray(adv, np.float64)[counts], np.asarray(credit, np.float64)[counts])[0, 1]
    assert found == pytest.approx(expected, abs=1e-5) and abs(expected) > 0.01
    without = advantage_metrics(obj, dataclasses.replace(batch, credit_PGT=None), mask_PGT, adv)
    assert "advantage/credit_correlation" not in without


@pytest.mark.parametrize("name", ["forks", *(pytest.param(each, marks=pytest.mark.nightly) for each in NAMES[:-1])])
@pytest.mark.slow
def test_a_task_trains_evaluates_and_is_warm_started(tmp_path, name):
    """Through the trainer with dynamic sampling, whose buffer holds the credit too; records have right and wrong apart."""
    changes = {"num_steps": 2, "warm_start.num_steps": 3, "eval.num_samples": 0, "model.dim": 16, "model.num_heads": 2}
    changes |= {"eval.num_prompts": 8, "rollout.num_prompts": 4, "model.num_kv_heads": 1, "dynamic_sampling.enabled": True}
    config = config_of(name, "runlocal", "dapo", **changes)
    trainer.train(config, tmp_path)
    assert saved_steps(tmp_path), "no credit in the buffer keeps a checkpoint from being saved"
    record = programs.records(tmp_path)[1]
    names = {"policy/entropy_right", "policy/entropy_wrong", "completion/length_right", "completion/length_wrong"}
    assert names <= set(record)
    assert ("advantage/credit_correlation" in record) == (name == "forks")


def test_each_step_of_a_chain_has_its_own_reward():
    """Against the steps read as text: 1 where a result is the true partial sum, whatever stands before it."""
    task, rng = task_of("chain"), random.Random(3)
    rows, texts = [], []
    for row in range(60):
        terms = [int(term) for term in task.question(task._problems[row]).rstrip("=").split("+")]
        text = task.teach(tuple(terms), rng, 0.3)
        spoiled = [
            text,
            text[: rng.randrange(len(text))] + "~",
            text + ",1+1=2",
            text.replace("=", "+", 1),
            ",," + text,
            "=" + text,
        ]
        rows.append(row)
        texts.append(rng.choice(spoiled))
    tokens_PGT, mask_PGT = completions(task, texts, 80)
    found_PGT = np.asarray(jax.jit(task.step_rewards)(jnp.asarray(rows), tokens_PGT, mask_PGT))
    outcomes = set()
    for row, text, found_T in zip(rows, texts, found_PGT[:, 0], strict=True):
        terms = [int(term) for term in task.question(task._problems[row]).rstrip("=").split("+")]
        sums = [sum(terms[: k + 2]) for k in range(len(terms) - 1)]
        expected = np.full(80, np.float32(UNKNOWN))
        steps, place = text.removesuffix("~").split(","), -1
        for k, step in enumerate(steps):
            place += len(step) + 1
            if k < len(steps) - 1 or not text.endswith("~"):
                written = re.search(r"=(\d+)$", step)
                expected[place] = bool(written) and k < len(sums) and int(written[1]) == sums[k]
        np.testing.assert_array_equal(found_T, expected)
        outcomes |= set(found_T.tolist())
    assert outcomes == {0.0, 1.0, float(np.float32(UNKNOWN))}


def test_a_task_without_rewards_of_steps_is_refused_with_the_objective_that_needs_them():
    with pytest.raises(
        UserError, match=r"config.objective.advantage = 'step_returns': task 'forks' gives no rewards for steps"
    ):
        run_lib.make_run(config_of("forks", variant="grpo_process"))


@pytest.mark.slow
def test_chain_is_trained_with_rewards_of_its_steps(tmp_path):
    """The advantage of an update is that of the steps as they were sampled."""
    changes = {"warm_start.num_steps": 0, "num_steps": 2, "eval.num_prompts": 8, "rollout.num_prompts": 4, "steps_per_call": 1}
    run = run_lib.make_run(config_of("chain", "runlocal", "grpo_process", **changes))
    state, batch, metrics = run.iterate(run.initial_state())
    steps_PGT = run.task.step_rewards(batch.rollout.prompts.answer, batch.rollout.tokens_PGT, batch.rollout.mask_PGT)
    np.testing.assert_array_equal(batch.step_reward_PGT, steps_PGT)
    assert np.isfinite(to_floats(jax.tree.map(lambda x: x[0], metrics))["loss/total"]) and int(state.step) == 1
