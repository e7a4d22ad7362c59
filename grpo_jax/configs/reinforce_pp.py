"""REINFORCE++: advantages are rewards normalised over the whole batch (Hu et al., arXiv 2501.03262).

grpo-jax train --config=reinforce_pp:tiny --workdir=runs/reinforce_pp
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "reinforce_pp")
