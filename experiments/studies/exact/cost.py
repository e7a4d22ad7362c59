"""Cost of model.numerics = "exact" on this machine: rollouts and updates of both forms, one after the other in turns.

    python -m experiments.studies.exact.cost [rounds]

One batch of `tiny` in bfloat16, no warm start; prints the medians of wall and processor seconds, and the gap of each form.
"""

import statistics
import sys
import time

import jax

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.training.run import make_run


def make(numerics: str):
    raw = base.get_config("tiny", "grpo")
    raw.update_from_flattened_dict(
        {"model.dtype": "bfloat16", "model.numerics": numerics, "warm_start.num_steps": 0, "mesh.data": 1}
    )
    run = make_run(parse_config(raw))
    return run, run.initial_state()


def timed(function, *args):
    """-> (result, wall seconds, processor seconds)."""
    wall, processor = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - wall, time.process_time() - processor


def main(rounds: str = "20") -> None:
    forms = {numerics: make(numerics) for numerics in ("fast", "exact")}
    seconds = {(numerics, part): [] for numerics in forms for part in ("rollout", "update")}
    gaps = dict.fromkeys(forms, 0.0)
    for number in range(int(rounds) + 1):
        for numerics, (run, state) in forms.items():
            (state, batch, _), *sampling = timed(run.collect, state)
            (state, metrics), *update = timed(run.update, state, batch)
            forms[numerics] = run, state
            if number:  # the first compiles
                seconds[numerics, "rollout"].append(sampling)
                seconds[numerics, "update"].append(update)
                gaps[numerics] = max(gaps[numerics], float(metrics["policy/sampler_logp_gap"].value()))
    for (numerics, part), pairs in seconds.items():
        wall, processor = (statistics.median(each) for each in zip(*pairs, strict=True))
        print(f"{numerics} {part}: {wall * 1e3:.1f} ms, processor {processor * 1e3:.1f} ms")
    print(f"largest gap between sampler and learner, nats: {gaps}")


if __name__ == "__main__":
    main(*sys.argv[1:])
