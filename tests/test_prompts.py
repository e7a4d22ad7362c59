"""What the model reads: BOS, special tokens, ids without a row, chat templates of the main families and their arguments."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

from grpo_jax.config import ArithmeticConfig, Config, TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks import chat
from grpo_jax.tasks.arithmetic import ArithmeticTask
from grpo_jax.tasks.host import HostTask
from grpo_jax.tasks.prompting import Prompting
from grpo_jax.tasks.questions import Question
from grpo_jax.tasks.sources import load_data
from grpo_jax.tasks.tokenizers import HFTokenizer
from grpo_jax.training.data_record import pin_template_date
from tests import tiny

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def save_tokenizer(
    folder: Path, *, begins: str = "", ends: str = "", added: tuple[str, ...] = (), template: str = "", **config: Any
) -> str:
    """A byte-level tokenizer. begins, ends: tokens around a text; added: without a merge; config: of config.json."""
    folder.mkdir(exist_ok=True)
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *added])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL, *added)])
    around = [(token, vocab[token]) for token in (begins, ends) if token]
    if around:
        raw.post_processor = processors.TemplateProcessing(single=f"{begins} $A {ends}".strip(), special_tokens=around)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(vocab), "eos_token_id": 2, **config}))
    return str(folder)


def prompt_of(tokenizer: HFTokenizer, text: str = "2+2?", shots: tuple[Question, ...] = (), **changes: Any):
    """The Prompt of a question. changes: fields of config.task."""
    return Prompting(TaskConfig(**changes), tokenizer, shots)(question(text))


def question(text: str, answer: str = "4") -> Question:
    return Question(({"role": "user", "content": text},), answer, {"prompt": text, "answer": answer})


# --- plain text


@pytest.mark.parametrize("begins, ends", [("<bos>", ""), ("<bos>", "<eos>"), ("", "<eos>"), ("", "")])
def test_a_plain_prompt_begins_as_the_tokenizer_begins_a_text_and_has_no_end(tmp_path: Path, begins: str, ends: str) -> None:
    path = save_tokenizer(tmp_path / "m", begins=begins, ends=ends)
    tokenizer, theirs = HFTokenizer(path), AutoTokenizer.from_pretrained(path)
    whole = theirs("2+2?")["input_ids"]
    expected = whole[:-1] if ends else whole
    assert expected[0] == (1 if begins else theirs.encode("2", add_special_tokens=False)[0]) and expected[-1] != 2
    assert prompt_of(tokenizer, use_chat_template=False).ids == expected
    # A text that brings its own gets no second one.
    own = prompt_of(tokenizer, "<bos>2+2?", use_chat_template=False).ids
    assert own.count(1) == 1 and own[0] == 1
    few = prompt_of(tokenizer, shots=(question("1+1?", "2"),), use_chat_template=False, system_prompt="S").ids
    assert tokenizer.decode_prompt(few) == f"{begins}S\n\n1+1?\n2\n\n2+2?\n" and few.count(1) == bool(begins)


def test_the_embedded_task_has_one_bos_and_none_before_answers(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_tokenizer(tmp_path / "m", begins="<bos>", ends="<eos>"))
    task = ArithmeticTask(ArithmeticConfig(max_operand=5, num_shots=2), tokenizer, seed=0, num_eval=3, max_answer_tokens=8)
    prompts = task.train_prompts(0, 8)
    rows = [row[mask].tolist() for row, mask in zip(prompts.tokens_PS, prompts.mask_PS, strict=True)]
    assert all(row[0] == 1 and row.count(1) == 1 and 2 not in row for row in rows)
    assert not (prompts.answer == 1).any()


def test_special_tokens_reach_the_reward_and_ends_do_not(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_tokenizer(tmp_path / "m", added=("<answer>",)))
    ids = tokenizer.encode("<think>4</think> <answer> , 4")
    assert 5 in ids and tokenizer.decode([*ids, 2, 0]) == "<think>4</think> <answer> , 4"
    assert tokenizer.decode_prompt([1, *ids, 2]) == "<bos><think>4</think> <answer> , 4<eos>"


# --- ids and positions that the model has not


def test_an_id_without_a_row_is_named_wherever_it_comes_from(tmp_path: Path) -> None:
    size = len(SPECIAL) + 256
    longer = HFTokenizer(save_tokenizer(tmp_path / "longer", added=("<tool>", "<x>"), vocab_size=size + 1))
    assert longer.encode("<tool>") == [size], "a tokenizer may be longer than the embedding, as Gemma 3's is"
    says = rf"has the token '<x>', id {size + 1}, but the embedding has {size + 1} rows .* tokenizer {size + 2} tokens"
    for use in (
        lambda: longer.encode("a<x>b"),
        lambda: prompt_of(longer, "a<x>", use_chat_template=False),
        lambda: prompt_of(longer, use_chat_template=False, system_prompt="think in <x>"),
    ):
        with pytest.raises(UserError, match=says):
            use()
    with pytest.raises(UserError, match=rf"a completion's end has the token '<x>', id {size + 1}"):
        HFTokenizer(save_tokenizer(tmp_path / "end", added=("<tool>", "<x>"), vocab_size=size + 1, eos_token_id=size + 1))
    path = save_tokenizer(tmp_path / "t", added=("<x>",), template="<x>{{ messages[0].content }}", vocab_size=size)
    templated = HFTokenizer(path)
    with pytest.raises(UserError, match=rf"'<x>', id {size}"):
        prompt_of(templated)
    inside = HFTokenizer(save_tokenizer(tmp_path / "gemma3", added=("<x>",), vocab_size=9, text_config={"vocab_size": size}))
    with pytest.raises(UserError, match=rf"'<x>', id {size}"):
        inside.encode("<x>")


def test_a_pad_token_without_a_row_is_replaced_since_nothing_reads_it(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "m", added=("[PAD]",), vocab_size=len(SPECIAL) + 256)
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[PAD]"}))
    assert HFTokenizer(path).pad_id == 2


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    "config, limit, wanted, outcome",
    [
        ({"max_position_embeddings": 16}, 16, 16, ""),
        ({"max_position_embeddings": 16}, 16, 17, "error"),
        ({}, 0, 10**6, ""),
        ({"model_type": "llama", "max_position_embeddings": 16, "rope_scaling": YARN}, 16, 64, "warning"),
        ({"model_type": "llama", "max_position_embeddings": 16, "rope_scaling": YARN}, 16, 65, "error"),
        ({"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": LLAMA31}, 64, 64, ""),
        ({"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": LLAMA31}, 64, 65, "error"),
        ({"text_config": {"max_position_embeddings": 16}}, 16, 17, "error"),
    ],
)
def test_prompt_and_budget_stay_within_the_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any], limit: int, wanted: int, outcome: str
) -> None:
    tokenizer = HFTokenizer(save_tokenizer(tmp_path / "m", **config))
    caplog.clear()
    says = rf"\(10 tokens\) and config.rollout.max_completion_tokens = {wanted - 10} are {wanted} tokens, .* = {limit}"
    if outcome == "error":
        with pytest.raises(UserError, match=says):
            tokenizer.check_length(10, wanted - 10)
    else:
        tokenizer.check_length(10, wanted - 10)
    assert len(caplog.messages) == (outcome == "warning")
    assert all(re.search(says, message) and "stretches them to 64" in message for message in caplog.messages)


# --- chat templates: small ones, each with the habits of a family

ASK = "{% if add_generation_prompt %}"
CHATML_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHATML = CHATML_TURNS + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN25 = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    + ASK
    + "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
THINKING = CHATML_TURNS + ASK + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<eos>' }}"  # noqa: RUF001
    "{% endif %}{% endfor %}" + ASK + "{{ '<｜Assistant｜><think>\n' }}{% endif %}"  # noqa: RUF001
)
V31 = R1.replace("<think>\n' }}", "' + ('<think>' if thinking is defined and thinking else '</think>') }}")
LLAMA32 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content }}<|eot_id|>{% endfor %}"
    + ASK
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}" + ASK + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
SILENT = (
    "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    + ASK
    + "assistant:{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now(\"%Y-%m-%d\") + '\nReasoning: ' + "
    "(reasoning_effort if reasoning_effort is defined else 'medium') + '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' }}{% endif %}{{ m.content }}<|end|>{% endfor %}"
    + ASK
    + "<|start|>assistant{% endif %}"
)
SMOLLM3 = (
    "{% set mode = '/no_think' if (enable_thinking is defined and not enable_thinking) else '/think' %}"
    "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode + '\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    + ASK
    + "{{ '<|im_start|>assistant\n' }}{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
CLOSED = "<think>\n\n</think>\n"

# name -> template, arguments, BOS in front, the system role is there, what the prompt has begun of the answer.
FAMILIES = {
    "chatml": (CHATML, {}, False, True, ""),
    "qwen2.5": (QWEN25, {}, False, True, ""),
    "qwen3": (QWEN3, {}, False, True, ""),
    "qwen3 not thinking": (QWEN3, {"enable_thinking": False}, False, True, f"{CLOSED}\n"),
    "qwen3 thinking 2507": (THINKING, {}, False, True, "<think>\n"),
    "r1 distilled": (R1, {}, True, True, "<think>\n"),
    "deepseek v3.1": (V31, {}, True, True, ""),
    "deepseek v3.1 thinking": (V31, {"thinking": True}, True, True, "<think>"),
    "llama 3.2": (LLAMA32, {"date_string": "26 Jul 2024"}, True, True, ""),
    "gemma 2": (GEMMA2, {}, True, False, ""),
    "no system, in silence": (SILENT, {}, False, False, ""),
    "mistral": (MISTRAL, {}, True, True, ""),
    "gpt-oss": (GPT_OSS, {"reasoning_effort": "high"}, False, True, ""),
    "smollm3": (SMOLLM3, {}, False, True, ""),
    "smollm3 not thinking": (SMOLLM3, {"enable_thinking": False}, False, True, CLOSED),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_what_the_template_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    template, arguments, has_bos, has_system, opens = FAMILIES[name]
    path = save_tokenizer(tmp_path / "m", begins="<bos>" if has_bos else "", template=template)
    tokenizer, theirs = HFTokenizer(path), AutoTokenizer.from_pretrained(path)
    config = TaskConfig(chat_template_kwargs=json.dumps(arguments), num_shots=1)

    def expected(*messages: tuple[str, str]) -> list[int]:
        chat = [{"role": role, "content": text} for role, text in messages]
        return theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **arguments)

    got = Prompting(config, tokenizer, ())(question("2+2?"))
    assert got.ids == expected(("user", "2+2?")) and got.opens == opens
    assert got.ids.count(1) == has_bos and (got.ids[0] == 1) == has_bos
    shown = Prompting(config, tokenizer, (question("1+1?", "2"),))(question("2+2?"))
    assert shown.ids == expected(("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")) and shown.opens == opens
    assert not caplog.messages
    system = prompt_of(tokenizer, chat_template_kwargs=config.chat_template_kwargs, system_prompt="Be brief.")
    if has_system:
        assert system.ids == expected(("system", "Be brief."), ("user", "2+2?")) and not caplog.messages
    else:
        assert system.ids == expected(("user", "Be brief.\n\n2+2?"))
        assert caplog.messages == ["the chat template has no system role: the system text begins the user's first turn"]
    assert tokenizer.decode_prompt(system.ids).count("Be brief.") == 1 and system.opens == opens


def test_what_begins_the_answer_reaches_the_rewards(tmp_path: Path) -> None:
    chat_ml = HFTokenizer(save_tokenizer(tmp_path / "chat", template=CHATML))
    thinking = HFTokenizer(save_tokenizer(tmp_path / "thinking", template=THINKING))
    for tokenizer, settings, opens in (
        (chat_ml, {}, ""),
        (chat_ml, {"assistant_prefill": "Let me see.\n<think>\nWell"}, "<think>\nWell"),
        (chat_ml, {"assistant_prefill": "Sure: "}, ""),
        (thinking, {"assistant_prefill": "I <b>count"}, "<think>\nI <b>count"),
        (chat_ml, {"use_chat_template": False}, ""),
        (chat_ml, {"use_chat_template": False, "assistant_prefill": "<think>\n"}, "<think>\n"),
        (chat_ml, {"use_chat_template": False, "prompt_template": "{prompt}\nAssistant: <think>"}, "<think>"),
        (chat_ml, {"use_chat_template": False, "prompt_template": "Use <think> tags: {prompt}"}, ""),
    ):
        prompt = prompt_of(tokenizer, **settings)
        assert prompt.opens == opens, settings
        assert tokenizer.decode_prompt(prompt.ids).endswith(settings.get("assistant_prefill", "") or opens)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?", "answer": str(i)}) + "\n" for i in range(4)))
    for tokenizer, expected in ((chat_ml, None), (thinking, "<think>\n")):
        task = task_of(tokenizer, tmp_path / "a.jsonl")
        assert {item.get("prompt_opens") for item in task._items} == {expected}
        assert ("prompt_opens" in task._items[0]) == (expected is not None)
        task.close()


def config_of(path: Path, **changes: Any) -> Config:
    settings = {"model.path": "unused", "task.name": "jsonl", "task.jsonl.path": str(path), "eval.num_prompts": 1}
    return tiny.config_of("grpo", {**settings, **{f"task.{name}": value for name, value in changes.items()}})


def task_of(tokenizer: HFTokenizer, path: Path, **changes: Any) -> HostTask:
    config = config_of(path, **changes)
    return HostTask(config, tokenizer, load_data(config))


PARTS = (
    "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}[assistant]"
)


def test_a_template_that_reads_parts_alone_is_given_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = HFTokenizer(save_tokenizer(tmp_path / "m", template=PARTS))
    assert tokenizer.decode_prompt(prompt_of(tokenizer, system_prompt="S").ids) == "[system]S[user]2+2?[assistant]"
    deaf = HFTokenizer(save_tokenizer(tmp_path / "deaf", template="[user][assistant]"))
    with pytest.raises(UserError, match=r"leaves out what the user says; give another one in config\.task\.chat_template"):
        prompt_of(deaf)
    assert not caplog.messages
    short = HFTokenizer(save_tokenizer(tmp_path / "short", template="{{ messages[-1].content[:6] }}"))
    prompt_of(short)
    prompt_of(short, "a longer question")
    assert caplog.messages == ["the chat template changes or leaves out what the user says: 'a longer question'"]


def test_a_template_of_a_file_takes_the_models_place(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    path = save_tokenizer(tmp_path / "m")
    assert not HFTokenizer(path).has_chat_template
    mine = HFTokenizer(path, str(tmp_path / "mine.jinja"))
    assert mine.decode_prompt(prompt_of(mine, chat_template=str(tmp_path / "mine.jinja")).ids) == "<|im_start|>2+2?"
    with pytest.raises(UserError, match=r"config\.task\.chat_template = '.*none\.jinja': cannot read it"):
        HFTokenizer(path, str(tmp_path / "none.jinja"))


def test_an_argument_that_no_template_reads_is_an_error(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_tokenizer(tmp_path / "m", template=QWEN3))
    with pytest.raises(UserError, match=r"reads no 'enable_thinkin'; did you mean enable_thinking"):
        prompt_of(tokenizer, chat_template_kwargs='{"enable_thinkin": false}')


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"chat_template_kwargs": "{enable"}, r"chat_template_kwargs = '\{enable': not JSON"),
        ({"chat_template_kwargs": "[1]"}, r"a JSON object"),
        ({"chat_template_kwargs": '{"tokenize": false}'}, r"chat_template_kwargs\.tokenize: set by the library"),
        ({"chat_template_kwargs": '{"a": 1}', "use_chat_template": False}, r"use_chat_template = True"),
        ({"template_date": "26 Jul 2024"}, r"template_date = '26 Jul 2024': a day, as 2026-11-26"),
        ({"prompt_template": "Answer in a box."}, r"where the question goes, write \{prompt\}"),
        ({"name": "arithmetic", "assistant_prefill": "<think>"}, r"assistant_prefill .* 'arithmetic' has none"),
        ({"name": "arithmetic", "prompt_template": "{prompt}!"}, r"prompt_template .* 'arithmetic' has none"),
    ],
)
def test_settings_of_prompts_are_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config_of(Path("a.jsonl"), **settings)


def test_arguments_may_be_a_dict() -> None:
    from grpo_jax.config import parse_config

    values = config_of(Path("a.jsonl")).to_dict()
    values["task"]["chat_template_kwargs"] = {"enable_thinking": False}
    values["task"]["reasoning_gym"]["params"] = {"basic_arithmetic": {"max_terms": 3}}
    config = parse_config(values)
    assert json.loads(config.task.chat_template_kwargs) == {"enable_thinking": False}
    assert json.loads(config.task.reasoning_gym.params)["basic_arithmetic"] == {"max_terms": 3}
    assert hash(config) == hash(parse_config(config.to_dict()))


# --- the day


@pytest.mark.parametrize("template, shown", [(LLAMA32, "26 Jul 2024"), (GPT_OSS, "2024-07-26"), (SMOLLM3, "26 July 2024")])
def test_the_day_that_a_template_writes_is_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, shown: str
) -> None:
    tokenizer = HFTokenizer(save_tokenizer(tmp_path / "m", template=template))
    text = tokenizer.decode_prompt(prompt_of(tokenizer, template_date="2024-07-26").ids)
    assert f"ate: {shown}" in text
    monkeypatch.setattr(chat, "today", lambda: datetime.date(2026, 1, 2))
    today = tokenizer.decode_prompt(prompt_of(tokenizer).ids)
    assert shown not in today and "2026" in today
    assert tokenizer.decode_prompt(prompt_of(tokenizer, template_date="2024-07-26").ids) == text
    # Argument and date: the template's own rule says which of them counts.
    if template == LLAMA32:
        own = prompt_of(tokenizer, template_date="2024-07-26", chat_template_kwargs='{"date_string": "1 May"}')
        assert "Today Date: 1 May" in tokenizer.decode_prompt(own.ids)


def test_a_run_keeps_the_day_of_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = save_tokenizer(tmp_path / "dated", template=LLAMA32)
    plain = save_tokenizer(tmp_path / "plain", template=CHATML)

    def pinned(path: str, *runs: str, **changes: Any) -> str:
        config = tiny.config_of("grpo", {"model.path": path, "task.name": "jsonl", **changes})
        return pin_template_date(config, [tmp_path / run for run in runs]).task.template_date

    monkeypatch.setattr("grpo_jax.training.data_record.today", lambda: datetime.date(2026, 11, 26))
    assert pinned(str(tmp_path / "none"), "a") == "", "the run says so, where it loads the model"
    assert pinned(plain, "a") == "" and pinned(dated, "a", **{"task.use_chat_template": False}) == ""
    assert pinned(dated, "a", **{"task.template_date": "2024-07-26"}) == "2024-07-26"
    assert pinned(dated, "a") == "2026-11-26"
    for run, day in (("a", "2026-11-26"), ("old", "")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.json").write_text(json.dumps({"task": {"template_date": day}}))
    monkeypatch.setattr("grpo_jax.training.data_record.today", lambda: datetime.date(2026, 11, 27))
    assert pinned(dated, "a") == "2026-11-26" and pinned(dated, "new") == "2026-11-27"
    assert pinned(dated, "new", "a") == "2026-11-26", "another run of the sweep has begun"
    assert pinned(dated, "old") == "", "its day is not known"
    # A template of a file, and one that transformers keeps in a file of its own.
    (tmp_path / "mine.jinja").write_text(GPT_OSS)
    assert pinned(plain, "new", **{"task.chat_template": str(tmp_path / "mine.jinja")}) == "2026-11-27"
    (tmp_path / "plain" / "chat_template.jinja").write_text(SMOLLM3)
    assert pinned(plain, "new") == "2026-11-27"


# --- prompts that are templated already


@pytest.mark.parametrize("template", [CHATML, GEMMA2, LLAMA32])
def test_prompts_that_are_templated_already_are_not_templated_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str
) -> None:
    tokenizer = HFTokenizer(save_tokenizer(tmp_path / "m", template=template))
    theirs = AutoTokenizer.from_pretrained(tokenizer.path)

    def templated(i: int) -> str:
        return theirs.apply_chat_template([{"role": "user", "content": f"{i}?"}], add_generation_prompt=True, tokenize=False)

    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"prompt": templated(i), "answer": str(i)}) + "\n" for i in range(6)))
    with pytest.raises(UserError, match=rf"6 of 6 prompts .* {data}:\d .*use_chat_template = False"):
        task_of(tokenizer, data)
    as_text = task_of(tokenizer, data, use_chat_template=False)
    as_text.close()
    assert not [message for message in caplog.messages if "markup" in message]
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(5)] + [{"prompt": templated(9), "answer": "9"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task_of(tokenizer, data).close()
    (message,) = [message for message in caplog.messages if "markup" in message]
    assert f"1 of 6 prompts hold a chat's markup already, {data}:6" in message
