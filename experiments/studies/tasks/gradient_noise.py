"""Signal and noise of the gradient over resampled batches, for several objectives on the same batches of one policy.

    python -m experiments.studies.tasks.gradient_noise runs/tasks/forks/runs/grpo-seed0 --step 0 --batches 64

The folder is a run's, of a traceable task, without dynamic sampling. Every batch has new prompts and new completions. Signal is
|E g|^2, noise the trace of the gradient's covariance, both without bias; their ratio says how many batches' mean has as much
signal as noise.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax

from grpo_jax import objectives
from grpo_jax.errors import UserError
from grpo_jax.learner.train_step import compute_gradients, make_target
from grpo_jax.tools import cli
from grpo_jax.training.run import make_run
from grpo_jax.training.settings import read_config

FIVE = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")


def signal_and_noise(square_of_sum, sum_of_squares, num):
    """Estimate |E g|^2 and the trace of g's covariance without bias.

    Args:
      square_of_sum: |g_1 + ... + g_n|^2. sum_of_squares: |g_1|^2 + ... + |g_n|^2. num: n, at least 2.
    Returns: (signal, noise); the signal may be below 0 by chance.
    """
    # The products of different batches' gradients alone: each batch with itself would count its noise as signal.
    signal = (square_of_sum - sum_of_squares) / (num * (num - 1))
    return signal, sum_of_squares / num - signal


def measure(run, state, names, num):
    """Return (signal, noise) of each objective's gradient over `num` batches that the state's policy samples."""

    def gradient(name, state, batch):
        config = dataclasses.replace(run.config, objective=dataclasses.replace(objectives.get(name), kl_coef=0.0))
        target = make_target(run.model, state, batch, config)
        return compute_gradients(run.model, state.params, state.base, target, config.objective, config)[0]

    @jax.jit
    def add(state, sums):
        """One more batch; the policy stays, prompts and randomness move on."""
        moved, batch, _ = run.fns.collect(state)
        state = dataclasses.replace(state, num_prompts_drawn=moved.num_prompts_drawn, step=state.step + 1)
        batch = dataclasses.replace(batch, sampled_at_P=jnp.full_like(batch.sampled_at_P, state.step))
        for name in names:
            grads = gradient(name, state, batch)
            total, squares = sums[name]
            total = jax.tree.map(jnp.add, total, grads)
            sums = sums | {name: (total, squares + jnp.square(optax.tree.norm(grads)))}
        return state, sums

    zero = jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0)
    sums = dict.fromkeys(names, zero)
    for _ in range(num):
        state, sums = add(state, sums)
    return {
        name: signal_and_noise(float(optax.tree.norm(total)) ** 2, float(squares), num)
        for name, (total, squares) in sums.items()
    }


def main(args):
    """Measure, and print a table in Markdown."""
    config = read_config(args.workdir)
    if config.dynamic_sampling.enabled or config.lora.rank:
        raise UserError(
            f"{args.workdir}: a run with dynamic sampling or adapters; take one without, the objectives are compared anyway"
        )
    run = make_run(dataclasses.replace(config, steps_per_call=0))
    # A checkpoint's weights need no warm start before them.
    weights = run.restore_policy(args.workdir, args.step) if args.step else run.initial_weights()
    state = run.init(weights, None, run.hyperparams)
    print(f"{args.workdir}, step {args.step}, {args.batches} batches of {config.rollout.num_prompts} groups, KL left out\n")
    print("| objective | signal | noise | signal / noise |\n| --- | ---: | ---: | ---: |")
    found = measure(run, state, args.objectives, args.batches)
    for name in args.objectives:
        signal, noise = found[name]
        print(f"| {name} | {signal:.3g} | {noise:.3g} | {signal / noise:.3g} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path, help="of the run")
    parser.add_argument("--step", type=int, default=0, help="checkpoint; 0: the weights that the run begins with")
    parser.add_argument("--batches", type=int, default=64, help="how many are sampled")
    parser.add_argument("--objectives", nargs="+", default=FIVE, help="names of variants and presets")
    cli.run(main, parser)
