"""Adding one number again and again, each step written out: a task of one's own, and its reward.

`16, and 5 more, 6 times:` is answered by `16 + 5 = 21, 21 + 5 = 26, ... 41 + 5 = 46`. What counts is the
result of the sixth step; the model was seen to go on beyond it.
"""

import random
import re
from typing import Any


def rows(num_steps: int = 6, highest_start: int = 24, highest_step: int = 5) -> list[dict[str, str]]:
    """Make every question with starts from 1 and steps from 2, in one shuffled order (`config.task.params`)."""
    questions = [(start, step) for start in range(1, highest_start + 1) for step in range(2, highest_step + 1)]
    random.Random(0).shuffle(questions)  # a resume must get the same rows
    return [
        {
            "prompt": f"{start}, and {step} more, {num_steps} times:",
            "answer": ", ".join(f"{at} + {step} = {at + step}" for at in range(start, start + num_steps * step, step)),
        }
        for start, step in questions
    ]


def result_of_last_step(completion: str, item: dict[str, Any]) -> float:
    """Score 1 if the last step that was asked for has the right result, whatever follows it (`config.reward.task`)."""
    wanted = re.findall(r"= (\d+)", item["answer"])
    found = re.findall(r"= (\d+)", completion)
    return float(len(found) >= len(wanted) and found[len(wanted) - 1] == wanted[-1])
