"""Scorers of completions, which run in processes of their own.

A scorer is a function `f(completion: str, item: dict, **settings) -> float | None`; functions of a user's own may have other
forms too (`grpo_jax.rewards.calling`). `item` is the prompt's row of data, its final answer under "answer".

One module per library. It imports what it needs at its top, since a time limit runs from when the module is there; and
none of it is JAX, for which a process that compares answers should not wait. So they are not in `tasks/`.
"""

# The parts that config.reward knows by a short name; `length` is counted where the tokens are.
FUNCTIONS = {
    "math_verify": "grpo_jax.rewards.scorers.math_answer:math_verify_score",
    "reasoning_gym": "grpo_jax.rewards.scorers.gym:reasoning_gym_score",
    "exact": "grpo_jax.rewards.scorers.text:exact_score",
    "regex": "grpo_jax.rewards.scorers.text:regex_score",
    "format": "grpo_jax.rewards.scorers.text:format_score",
    "choice": "grpo_jax.rewards.scorers.choice:choice_score",
    "repetition": "grpo_jax.rewards.scorers.repetition:repetition_score",
    "code": "grpo_jax.rewards.scorers.code:code_score",
    "judge": "grpo_jax.rewards.scorers.judge:judge_score",
}

# Those that look for an answer, behind the reasoning.
LOOKS_FOR_AN_ANSWER = ("math_verify", "reasoning_gym", "exact", "regex", "choice", "code")
# Those that do better with all completions of a prompt at once.
GROUP_FUNCTIONS = {"judge": "grpo_jax.rewards.scorers.judge:judge_scores"}
