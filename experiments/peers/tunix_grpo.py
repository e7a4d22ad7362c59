"""Tunix's GRPOLearner on the workload, on the CPU: python -m experiments.peers.tunix_grpo --what=update (its environment).

rollout: RLCluster.generate with the vanilla sampler. update: reference log-probs if beta > 0, the trainer's compiled step.
step: `train()`, from one call of the reward function to the next. mem: update. Differs from the other systems: its llama3 has
rotary frequencies of its own (the cost is the same), and bfloat16 holds for its weights and AdamW's state too.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import numpy as np

from experiments.peers import workload
from experiments.peers.workload import LEARNING_RATE, PAD, Timing, Workload


class Words:
    """The tokenizer that Tunix needs: text in, text out. Its stop token lies outside the vocabulary."""

    def __init__(self, never: int):
        self.never = never

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return workload.as_text(np.asarray(ids).tolist())

    def bos_id(self) -> int:
        return 0  # the sampler then puts none before the prompt

    def eos_id(self) -> int:
        return self.never

    def pad_id(self) -> int:
        return PAD


def main() -> None:
    import jax
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    work = workload.parse()
    if work.rows_at_a_time % work.group_size:
        raise SystemExit(f"error: --microbatch={work.microbatch}: Tunix cuts by prompts, use a multiple of {work.group_size}")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    marks: list[float] = []
    learner = make_learner(work, mesh, marks)
    if work.what == "rollout":
        timing = time_rollout(learner, work)
    elif work.what == "step":
        timing = time_step(learner, work, marks)
    else:
        with mesh:
            timing = time_update(learner, work)
    names = ("google-tunix", "jax", "flax")
    version = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    workload.emit(workload.report("tunix", version, work, timing))


def make_model(work: Workload, seed: int) -> Any:
    """Its Llama with random weights."""
    import jax
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    shape = work.shape
    config = llama3.ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.dim,
        hidden_dim=shape.ffn_dim,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=int(shape.rope_theta),
        norm_eps=1e-5,
        weight_tying=True,
        remat_config=llama3.RematConfig.DECODER if work.remat else llama3.RematConfig.NONE,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(params=seed))
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> Any:
        """Its matrices wait for a checkpoint, some of them as zeros; norms stay ones."""
        values = x if x.ndim < 2 else 0.02 * rng.standard_normal(x.shape, np.float32)
        return jax.numpy.asarray(values, work.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def make_learner(work: Workload, mesh: Any, marks: list[float]) -> Any:
    """A GRPOLearner over a cluster of one device. marks: gets the time of every reward call."""
    import optax
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    num_steps = max(work.warmup, 1) + work.repeats + 1
    is_cut = work.rows_at_a_time < work.rows
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE)),
        eval_every_n_steps=1_000_000,
        max_steps=num_steps,
        mini_batch_size=work.prompts if is_cut else None,  # counted in prompts
        train_micro_batch_size=work.rows_at_a_time // work.group_size if is_cut else None,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=work.completion_len,
        max_prompt_length=work.prompt_len,
        kv_cache_size=work.prompt_len + work.completion_len,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[work.shape.never],
    )
    cluster = rl_cluster.RLCluster(
        actor=make_model(work, 0),
        reference=make_model(work, 0) if work.beta else None,
        tokenizer=Words(work.shape.never),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
        ),
    )

    def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        marks.append(time.perf_counter())
        assert {len(text.split()) for text in completions} == {work.completion_len}, "a completion ended early"
        return [float(len(text) % 7) for text in completions]

    algorithm = grpo_learner.GRPOConfig(num_generations=work.group_size, num_iterations=1, beta=work.beta, epsilon=0.2)
    return grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=algorithm)


def time_rollout(learner: Any, work: Workload) -> Timing:
    prompts = [workload.as_text(ids) for ids in work.prompt_ids() for _ in range(work.group_size)]

    def count(output: Any) -> float:
        assert {len(row) for row in output.tokens} == {work.completion_len}, "a completion ended early"
        return float(work.num_tokens)

    def generate(_: int) -> Any:
        return learner.rl_cluster.generate(prompts=list(prompts), micro_batch_size=work.rows)

    return workload.timed(generate, count, work.warmup, work.repeats)


def time_update(learner: Any, work: Workload) -> Timing:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl.grpo.grpo_learner import TrainExample

    cluster, at_a_time = learner.rl_cluster, work.rows_at_a_time
    train_step, _ = cluster.actor_trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as its train() asks for it
    prompt_ids = jnp.asarray([row for row in work.prompt_ids() for _ in range(work.group_size)], jnp.int32)
    completion_ids = jnp.asarray(work.completion_ids(), jnp.int32)
    advantages = jnp.asarray([workload.advantage(row) for row in range(work.rows)])

    def update(_: int) -> Any:
        for start in range(0, work.rows, at_a_time):
            prompts, completions = prompt_ids[start : start + at_a_time], completion_ids[start : start + at_a_time]
            ref_logps = None
            if work.beta:
                ref_logps = cluster.get_ref_per_token_logps(
                    prompt_tokens=prompts, completion_tokens=completions, pad_id=PAD, eos_id=work.shape.never
                )
            example = TrainExample(
                prompt_ids=prompts,
                prompt_mask=prompts != PAD,
                completion_ids=completions,
                completion_mask=completions != PAD,
                ref_per_token_logps=ref_logps,
                advantages=advantages[start : start + at_a_time],
                old_per_token_logps=None,
            )
            train_step(example)
        return jax.block_until_ready(nnx.state(cluster.actor_trainer.model))

    return workload.timed(update, lambda _: float(work.num_tokens), work.warmup, work.repeats)


def time_step(learner: Any, work: Workload, marks: list[float]) -> Timing:
    prompts = np.array([workload.as_text(ids) for ids in work.prompt_ids()])
    began = time.perf_counter()
    learner.train([{"prompts": prompts} for _ in range(max(work.warmup, 1) + work.repeats + 1)])
    return workload.timed_by_marks(began, marks[1:], work)  # the first mark lies inside the first step


if __name__ == "__main__":
    main()
