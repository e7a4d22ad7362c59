"""A sweep is every config file x every set of changes x every seed. The format, and how to write sets.

    config = base.get_config(scale)
    config.configs = ("grpo", "dapo")
    config.sets = {"": {}, "no_kl": {"objective.kl_coef": 0.0}}          # named; "" is the config file as it is
    config.sets = base.grid({"objective.kl_coef": (0.0, 0.04), "optimizer.learning_rate": (3e-4, 6e-4)})
    config.more_sets = {"dapo": {"no_filter": {"dynamic_sampling.enabled": False}}}      # of one config alone
    config.sets = base.each([{"objective.clip_low": x, "objective.clip_high": 2 * x} for x in (0.1, 0.2)])

A run is named after its config file and its set, "grpo-no_kl", and its folder after its seed too. Fields are those of
configs/base.py, dotted; a set may change any of them but the seed. Runs of one seed begin with the same weights and draw the
same prompts, so that settings can be compared seed by seed.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

Changes = Mapping[str, Any]  # field of configs/base.py, dotted -> value


def get_config(scale: str = "tiny") -> Any:
    """Make the config that all sweeps begin from."""
    config: Any = ConfigDict(convert_dict=False)  # sets have dots in their keys
    config.scale = scale  # what follows the colon of each config file: tiny | smollm2 | runlocal
    config.configs = ()  # shipped names (dapo) or files (my/dapo.py); the name of each is the `variant` of its runs
    config.sets = {"": {}}  # name -> changes
    config.more_sets = {}  # one of the configs -> sets of its own, beside those
    config.seeds = tuple(range(8))
    config.num_processes = 0  # runs at a time; 0: one a processor core, one in all on an accelerator
    config.cohort_size = 1  # runs that one vmapped call advances, whatever their objectives; 0: all that may share one
    return config


def grid(values: Mapping[str, Iterable[Any]]) -> dict[str, Changes]:
    """Every combination: {field: values} -> sets, each named after its values."""
    return each(dict(zip(values, point, strict=True)) for point in itertools.product(*values.values()))


def each(changes: Iterable[Changes]) -> dict[str, Changes]:
    """These changes, each named after its values: {"objective.kl_coef": 0.1} is "kl_coef=0.1"."""
    return {",".join(f"{field.rpartition('.')[2]}={value}" for field, value in one.items()): one for one in changes}


def crossed(left: Mapping[str, Changes], right: Mapping[str, Changes]) -> dict[str, Changes]:
    """Every set on the left with every one on the right; where both change a field, the right one stands."""
    pairs = itertools.product(left.items(), right.items())
    return {"-".join(filter(None, (a, b))): {**one, **other} for (a, one), (b, other) in pairs}
