"""Any generator of reasoning-gym (arXiv:2505.24760), scored by the library's own scorer."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from typing import Any

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.host import HostTask, Question, same_text, without

SCORER = "grpo_jax.scorers.gym:reasoning_gym_score"


class ReasoningGymTask(HostTask):
    """Questions of one generator; the reward is its `score_answer`, in [0, 1], of the text in <answer>...</answer>.

    num_eval: questions held out, from a seed of their own; training questions with the same text are left out.
    config.reasoning_gym.system_prompt: a text, or the name of one of the library's (`default`, `direct`, ...).
    The chat template is used where the tokenizer has one.
    A few generators (isomorphic_strings, polynomial_multiplication, ransom_note, word_ladder in 0.1.25) iterate over
    sets: they give the same questions in another process, as in a resumed run, only under the same PYTHONHASHSEED.
    Raises UserError for an unknown generator, for settings it does not take, and if nothing is left to train on.
    """

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, seed: int, num_eval: int) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError("task.name = 'reasoning_gym' needs reasoning-gym: pip install 'grpo_jax[tasks]'")
        gym = config.reasoning_gym
        name, params = gym.dataset, dict(gym.params)
        held_out = _generate(name, params, _split_seed("held out", seed), num_eval) if num_eval else []
        held_out = list({same_text(question.prompt): question for question in held_out}.values())
        train = without(_generate(name, params, _split_seed("train", seed), gym.num_train), held_out)
        if not train:
            raise UserError(
                f"task.reasoning_gym.dataset = {name!r}: all {gym.num_train} training questions are held out; "
                "raise num_train, lower eval.num_prompts, or set params for which there are more questions"
            )
        super().__init__(
            config,
            tokenizer,
            train,
            held_out,
            scorer=SCORER,
            system_prompt=_system_prompt(gym.system_prompt),
            use_chat=getattr(tokenizer, "has_chat_template", False),
            seed=seed,
        )


def _generate(name: str, params: dict[str, Any], seed: int, size: int) -> list[Question]:
    """`size` questions of a generator, each with all that `grpo_jax.scorers.gym` needs."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)[:3]
        raise UserError(f"task.reasoning_gym.dataset = {name!r}: no such generator; there are {', '.join(close)}, ...")
    reserved = next((key for key in ("seed", "size") if key in params), None)
    if reserved:
        raise UserError(f"task.reasoning_gym.params.{reserved}: set by the run (seed, task.reasoning_gym.num_train)")
    try:
        entries = list(create_dataset(name, **params, seed=seed, size=size))
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"task.reasoning_gym.params = {params!r}: {name} does not take them: {reason[0]}") from error
    settings = {"dataset": name, "params": {**params, "seed": seed, "size": 1}}  # a scorer need not generate anything
    return [Question(entry["question"], {**settings, "entry": entry}) for entry in entries]


def _split_seed(split: str, seed: int) -> int:
    """Seeds far apart: generators draw question i from seed + i, so that neighbouring seeds share most questions."""
    return int.from_bytes(hashlib.sha256(f"{split} {seed}".encode()).digest()[:4], "little") % 2**31


def _system_prompt(text_or_name: str) -> str:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    return SYSTEM_PROMPTS.get(text_or_name, text_or_name)
