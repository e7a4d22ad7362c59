"""REINFORCE++: advantages are rewards normalised over the whole batch (Hu et al., arXiv 2501.03262).

python -m experiments.train --config=configs/reinforce_pp.py:tiny --workdir=runs/reinforce_pp
"""

from configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "reinforce_pp")
