"""Loss and gradient of prime-rl's default loss on one ragged batch, as numbers that tests/test_parity.py compares with.

prime-rl is on no index: give the file src/prime_rl/trainer/rl/loss.py of its repository, which torch, beartype and jaxtyping
are enough for.

    python experiments/peers/prime_rl_objectives.py --loss=loss.py --commit=559b44772 --out=tests/parity/prime_rl.json
"""

import argparse
import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch
from parity_batch import make_batch, write  # pyright: ignore[reportMissingImports]

CASES = {"prime_rl_default": {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3}}
CASES["narrow"] = {**CASES["prime_rl_default"], "dppo_mask_low": 0.02, "dppo_mask_high": 0.05, "kl_tau": 0.1}


def load(file):
    """The module of the loss, with empty places where it imports configs and helpers that this loss does not use."""
    for name in ("prime_rl", "prime_rl.configs", "prime_rl.configs.trainer", "prime_rl.utils", "prime_rl.utils.utils"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("CustomLossConfig", "DefaultLossConfig", "IPOLossConfig", "LossConfig"):
        setattr(sys.modules["prime_rl.configs.trainer"], name, types.SimpleNamespace)
    vars(sys.modules["prime_rl.utils.utils"])["import_object"] = None
    spec = importlib.util.spec_from_file_location("prime_rl_loss", file)
    assert spec and spec.loader
    module = sys.modules["prime_rl_loss"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss_and_gradient(module, case, tensors):
    """The sum over rows divided by the number of tokens, as its trainer does; and the gradient by the log-probabilities."""
    logp = tensors["logp"].clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, mask in enumerate(tensors["mask"] > 0):
        inputs = module.LossInputs(
            trainer_logprobs=logp[row],
            inference_logprobs=tensors["old_logp"][row],
            ref_logprobs=None,
            advantages=tensors["advantage"][row].expand(len(mask)),
            loss_mask=mask,
        )
        total = total + module.default_loss_fn(inputs, types.SimpleNamespace(**case)).loss
    loss = total / tensors["mask"].sum()
    loss.backward()
    return {"loss": loss.item(), "gradient": np.asarray(logp.grad).tolist()}


def main():
    """Write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", type=pathlib.Path, required=True, help="prime-rl's loss.py")
    parser.add_argument("--commit", required=True, help="of its repository, for the record")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    module, batch = load(args.loss), make_batch()
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in batch.items()}
    losses = {name: {"settings": case, **loss_and_gradient(module, case, tensors)} for name, case in CASES.items()}
    write(args.out, ("torch", "numpy"), batch, losses, {})


if __name__ == "__main__":
    main()
