"""One long prompt among short ones: rollout and update with a width for each part, beside one width for all.

    python -m experiments.mixed_prompts --model=tiny --prompts=32 --short=64 --long=512

The two are timed in turn, in one process. One JSON line: medians in seconds, and their ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.peers import workload
from experiments.peers.workload import SHAPES
from experiments.synthetic import architecture, random_batch
from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.training.run import assemble
from grpo_jax.training.samplers import end_tokens, make_rollout
from grpo_jax.training.widths import fit_prompts, prompt_buckets, prompt_lengths
from grpo_jax.types import Prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--completion_len", type=int, default=32)
    parser.add_argument("--short", type=int, default=64)
    parser.add_argument("--long", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    raw = base.get_config()
    raw.update_from_flattened_dict(
        {
            **{"warm_start.num_steps": 0, "eval.num_samples": 0, "mesh.data": 1, "dynamic_sampling.enabled": False},
            **{"rollout.num_prompts": args.prompts, "rollout.group_size": args.group_size},
            **{"rollout.max_completion_tokens": args.completion_len, "optimizer.learning_rate": workload.LEARNING_RATE},
        }
    )
    config, vocab = parse_config(raw), SHAPES[args.model].vocab_size
    tokens_PS = np.asarray(workload.random_ids(args.prompts, args.long, vocab, seed=0), np.int32)
    mesh, task = make_mesh(config.mesh.sizes), FixedTask(tokens_PS, workload.PAD)
    run = assemble(config, mesh, task, ModelDef(architecture(args.model), dtype=config.model.dtype))
    lengths_P = np.full(args.prompts, args.short)
    lengths_P[args.prompts // 2] = args.long
    mask_PS = jnp.arange(args.long)[None] >= args.long - lengths_P[:, None]
    one_width = Prompts(jnp.where(mask_PS, tokens_PS, 0), mask_PS, jnp.zeros(args.prompts, jnp.int32))
    in_parts = fit_prompts(one_width, np.asarray(prompt_lengths(mask_PS)), 1, prompt_buckets(config, args.long))
    assert in_parts.long_rows is not None, "these lengths are not worth two widths"
    rollout = jax.jit(make_rollout(run.model, config.rollout, end_tokens(task), mesh))
    batch = random_batch(run)
    state = run.initial_state()
    secs: dict[str, list[float]] = {}

    def timed(name: str, function: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        secs.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for i in range(args.repeats + 1):  # the first compiles
        for name, prompts in (("one width", one_width), ("parts", in_parts)):
            timed(f"rollout, {name}", rollout, state.policy, prompts, jax.random.key(i))
            mixed = dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, prompts=prompts))
            state, _ = timed(f"update, {name}", run.update, state, mixed)
    medians = {name: statistics.median(each[1:]) for name, each in secs.items()}
    ratios = {what: medians[f"{what}, one width"] / medians[f"{what}, parts"] for what in ("rollout", "update")}
    print(json.dumps({**vars(args), "secs": medians, "ratio": ratios}))


if __name__ == "__main__":
    main()
