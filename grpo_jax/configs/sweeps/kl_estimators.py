"""The KL penalty by k1, k2 and k3, at two weights and at none. Watch policy/kl_ref, which is k3 in all of them.

k1's gradient is 0 in expectation (docs/variants.md): its runs should drift like the one without a penalty.

    grpo-jax sweep --config=sweeps/kl_estimators:tiny --workdir=runs/kl_estimators
"""

from grpo_jax.configs.sweeps import base


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = ("grpo",)
    penalties = base.grid({"objective.kl_estimator": ("k1", "k2", "k3"), "objective.kl_coef": (0.04, 0.4)})
    config.sets = {"kl_coef=0": {"objective.kl_coef": 0.0}, **penalties}
    return config
