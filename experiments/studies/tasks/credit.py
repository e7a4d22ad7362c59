"""How well the advantages of each variant follow true credit on task "forks", for a policy that is the teacher himself.

    python -m experiments.studies.tasks.credit --out experiments/studies/tasks/credit.csv

No model and no training: completions are drawn from the teacher's own distribution, whose probabilities and entropies are
known exactly, and Pearson's correlation of the advantages with Q - V is taken over all of their tokens. Rows of the table are
objectives, columns the entropy of the filler; a hard fork has 0.5 nats, an easy one 0.01.
"""

import argparse
import pathlib

import numpy as np

from grpo_jax import objectives
from grpo_jax.config import ForksConfig
from grpo_jax.tasks.forks import BRANCHES, FILLERS, ForksTask, filler_shares
from grpo_jax.tools import cli

FIVE = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
OBJECTIVES = {name: objectives.get(name) for name in (*FIVE, "gtpo_geometric", "grpo_s_geometric")}
for name in ("gtpo", "gtpo_geometric"):
    OBJECTIVES[f"{name}, stat_scope group"] = objectives.get(name, stat_scope="group")
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0)
EASY = 0.999  # probability of the right branch where the teacher is careful


def entropy_of(shares):
    """Entropy in nats of shares on the last axis."""
    return -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)


def sample(config, label_noise, num_prompts, group_size, seed):
    """Draw completions of the teacher.

    Args:
      config: of the task. label_noise: how often a hard fork is wrong. num_prompts, group_size: P, G. seed: of the draw.
    Returns: (rewards [P, G], true credit [P, G, T], entropies [P, G, T]).
    """
    rng = np.random.default_rng(seed)
    task = ForksTask(config, seed=0, num_eval=16, max_answer_tokens=config.longest_answer)
    T = config.longest_answer - 1
    rows_P = rng.integers(16, len(task._problems), num_prompts)
    digit_PK = np.asarray([[int(x) for x in task._problems[row]] for row in rows_P])
    p_PK = np.where(digit_PK >= 10 - config.hard_digits, 1 - label_noise, EASY)
    is_right_PGK = rng.random((num_prompts, group_size, config.num_forks)) < p_PK[:, None]
    shares = np.asarray(filler_shares(config.filler_entropy))
    tokens = rng.choice(task.tokenizer.encode(FILLERS), (num_prompts, group_size, T), p=shares)
    entropies = np.full(tokens.shape, entropy_of(shares))
    logp = np.zeros(tokens.shape)
    branch_PGK = np.where(is_right_PGK, digit_PK[:, None] % 2, 1 - digit_PK[:, None] % 2)
    tokens[..., task.places] = np.asarray(task.tokenizer.encode(BRANCHES))[branch_PGK]
    entropies[..., task.places] = entropy_of(np.stack([p_PK, 1 - p_PK], -1))[:, None]
    logp[..., task.places] = np.log(np.where(is_right_PGK, p_PK[:, None], 1 - p_PK[:, None]))
    mask = np.ones(tokens.shape, np.float32)
    credit = task.token_credit(rows_P, tokens, mask, logp.astype(np.float32))
    rewards = np.asarray(task.reward(rows_P, tokens, mask).task_PG)
    return rewards, np.asarray(credit, np.float64), entropies


def correlation(name, rewards, credit, entropies):
    """Pearson's correlation of an objective's advantages with credit, over all tokens."""
    P, G, T = credit.shape
    adv_BT = objectives.advantages(
        OBJECTIVES[name],
        rewards.reshape(-1).astype(np.float32),
        np.ones((P * G, T), np.float32),
        entropies.reshape(-1, T).astype(np.float32),
        group_size=G,
    )
    return np.corrcoef(np.asarray(adv_BT, np.float64).ravel(), credit.ravel())[0, 1]


def main(args):
    """Print a table in Markdown, and write the numbers as CSV."""
    found = {name: [] for name in OBJECTIVES}
    for entropy in ENTROPIES:
        draws = [sample(ForksConfig(filler_entropy=entropy), 0.8, args.prompts, 8, seed) for seed in range(args.seeds)]
        for name in OBJECTIVES:
            values = [correlation(name, *draw) for draw in draws]
            found[name].append((np.mean(values), np.std(values, ddof=1)))
    print(f"{args.prompts} prompts of 8 completions, mean of {args.seeds} draws (standard deviation of one)\n")
    print(f"| objective | {' | '.join(f'{entropy:g} nats' for entropy in ENTROPIES)} |\n|---{'|---:' * len(ENTROPIES)}|")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{mean:.3f} ({std:.3f})' for mean, std in values)} |")
    if args.out:
        lines = ["objective,filler_entropy,mean,std"]
        for name, values in found.items():
            lines += [
                f'"{name}",{entropy:g},{mean:.4f},{std:.4f}' for entropy, (mean, std) in zip(ENTROPIES, values, strict=True)
            ]
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="in each draw")
    parser.add_argument("--seeds", type=int, default=5, help="draws, at least 2")
    parser.add_argument("--out", type=pathlib.Path, help="CSV of the numbers")
    cli.run(main, parser)
