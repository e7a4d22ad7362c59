"""Chat templates of published models: is a prompt what transformers makes of it, with one BOS and the right end of a turn?

python -m tests.campaigns.templates --folder=templates   (a folder of .jinja files, such as TRL's wheel has)
"""

import argparse
import json
import pathlib
import re
import tempfile

from transformers import AutoTokenizer

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks.prompting import Prompting
from grpo_jax.tasks.questions import Question
from grpo_jax.tasks.tokenizers import HFTokenizer, end_of_turn
from tests.campaigns.common import Tally
from tests.test_prompts import SPECIAL, save_tokenizer

MARKS = re.compile(r"<[|\uff5c][^<>|\uff5c]+[|\uff5c]>|<(?:start|end)_of_\w+>|<turn\|>|<\|turn>|\[/?INST\]|<\|?/?[A-Z_]+\|?>")
USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "Be brief."}
CHATS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "several": [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"}],
}
ARGUMENTS = (
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"reasoning_effort": "low"},
    {"date_string": "1 May 2025"},
)


def main() -> None:
    """Try every template of a folder with every chat and every argument that it reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="of .jinja files")
    tally = Tally("chat templates")
    for file in sorted(parser.parse_args().folder.glob("*.jinja")):
        try_template(file, tally)
    tally.show()


def try_template(file: pathlib.Path, tally: Tally) -> None:
    """Add the cases of one template to a tally."""
    text = file.read_text()
    marks = tuple(mark for mark in dict.fromkeys(MARKS.findall(text)) if mark not in SPECIAL)
    with tempfile.TemporaryDirectory() as folder:
        path = save_tokenizer(pathlib.Path(folder) / "m", begins="<bos>" * ("bos_token" in text), added=marks, template=text)
        tokenizer, theirs = HFTokenizer(path), AutoTokenizer.from_pretrained(path)
        print(f"{file.stem}: a turn ends with {end_of_turn(tokenizer)}")
        for name, chat in CHATS.items():
            for arguments in ARGUMENTS:
                if set(arguments) <= set(re.findall(r"\w+", text)):
                    case = f"{file.stem}, {name}, {arguments}"
                    tally.add(*_compare(tokenizer, theirs, chat, arguments, case))


def _wanted(theirs, chat, arguments):
    """What transformers makes of a chat; of one with parts for contents where the template takes no texts. Or its exception."""
    wanted = None
    for each in (chat, [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]):
        try:
            ids = theirs.apply_chat_template(each, add_generation_prompt=True, return_dict=False, **arguments)
        except Exception as error:  # a template is a program, and may refuse a chat
            wanted = wanted or error
            continue
        if chat[-1]["content"] in theirs.decode(ids):
            return ids
    return wanted


def _compare(tokenizer, theirs, chat, arguments, case):
    wanted = _wanted(theirs, chat, arguments)
    config = TaskConfig(chat_template_kwargs=json.dumps(arguments) if arguments else "")
    try:
        ids = Prompting(config, tokenizer, ())(Question(tuple(chat), "4", {})).ids
    except UserError as error:
        return ("clear line", case, str(error))
    except Exception as error:
        return ("traceback", case, repr(error))
    if isinstance(wanted, Exception):
        return ("harmless" if chat[0]["role"] == "system" else "silent", case, f"transformers refuses it: {wanted}")
    bos = theirs.bos_token_id
    num_bos = ids.count(bos)
    is_right = ids == wanted and num_bos <= 1 and (not num_bos or ids[0] == bos)
    return ("harmless" if is_right else "silent", case, "" if is_right else f"{tokenizer.decode_prompt(ids)!r}")


if __name__ == "__main__":
    main()
