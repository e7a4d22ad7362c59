"""GTPO as its paper runs it: entropies clipped to 0.2 and 0.28, dynamic sampling, GROP (Tan et al., arXiv 2508.04349).

`:paper` has its batch of 128 prompts, 16 completions, 2048 + 4096 tokens and learning rate too, for a model and task of yours:
mean@32 and pass@2..32 come from 32 samples a held-out question. The share of right answers from which a group is easy for GROP,
0.75, is ours: the versions that we could read do not say it.

    grpo-jax train --config=gtpo_paper:tiny --workdir=runs/gtpo_paper
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    config = base.get_config("llm" if scale == "paper" else scale, "gtpo_paper")
    config.dynamic_sampling.enabled = True
    config.overlong.easy_share = 0.75
    if scale == "paper":
        config.task.max_prompt_tokens = 2048
        config.rollout.num_prompts = 128
        config.rollout.group_size = 16
        config.rollout.max_completion_tokens = 4096
        config.rollout.temperature = 1.0
        config.optimizer.learning_rate = 1e-6
        config.eval.num_samples = 32
    return config
