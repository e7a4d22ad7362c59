"""The five variants on sums with written steps, by SmolLM2-135M-Instruct; three seeds.

grpo-jax sweep --config=experiments/studies/smollm2/written_steps_sweep.py --workdir=runs/written_steps
"""

from grpo_jax.configs.sweeps import variants

HERE = "experiments.studies.smollm2.written_steps"


def get_config():
    config = variants.get_config("smollm2")
    config.sets = {
        "": {
            "task.name": f"{HERE}:rows",
            "task.num_shots": 3,
            "task.use_chat_template": False,
            "reward.task": f"{HERE}:result_of_last_step",
            "rollout.max_completion_tokens": 72,
            "rollout.stop": ("\n",),
            "rollout.num_prompts": 4,
            "rollout.group_size": 4,
            "num_steps": 20,
            "optimizer.learning_rate": 2e-5,
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 2,
            "eval.num_prompts": 32,
            "eval.num_samples": 2,
            "eval_every": 0,
            "checkpoint.every": 0,
            "checkpoint.keep": 0,
            "log.completions_every": 5,
        }
    }
    config.seeds = (0, 1, 2)
    return config
