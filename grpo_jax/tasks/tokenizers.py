"""Text to ids and back: one id per character for the embedded task, any Hugging Face tokenizer for language models."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from grpo_jax.errors import UserError
from grpo_jax.tasks import Tokenizer
from grpo_jax.types import Arrays

NUM_SPECIAL = 2  # pad and eos, before the characters

_log = logging.getLogger(__name__)


class CharTokenizer:
    """Ids 0 = pad, 1 = eos, then the characters of `alphabet` in order.

    >>> tokenizer = CharTokenizer("ab")
    >>> tokenizer.encode("ba"), tokenizer.decode([3, 2, 1, 0])
    ([3, 2], 'ba')
    """

    pad_id = 0
    eos_ids: tuple[int, ...] = (1,)

    def __init__(self, alphabet: str) -> None:
        """Raises UserError if a character is in the alphabet twice."""
        repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
        if repeated:
            raise UserError(f"alphabet {alphabet!r}: {repeated[0]!r} stands in it more than once")
        self.alphabet = alphabet
        self.vocab_size = NUM_SPECIAL + len(alphabet)
        self._ids = {char: NUM_SPECIAL + i for i, char in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Raises UserError naming a character that is not in the alphabet."""
        unknown = next((char for char in text if char not in self._ids), None)
        if unknown is not None:
            raise UserError(f"character {unknown!r} in {text!r:.60} is not in the alphabet {self.alphabet!r:.200}")
        return [self._ids[char] for char in text]

    def encode_prompt(self, text: str) -> list[int]:
        """Text -> ids, as `encode`: nothing begins a text here."""
        return self.encode(text)

    def decode(self, ids: Sequence[int] | Int[Arrays, " T"]) -> str:
        """Ids -> text, pad and eos left out."""
        return "".join(self.alphabet[i - NUM_SPECIAL] for i in np.asarray(ids, int).tolist() if i >= NUM_SPECIAL)

    def decode_prompt(self, ids: Sequence[int] | Int[Arrays, " T"]) -> str:
        """Ids -> text, as `decode`."""
        return self.decode(ids)

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face tokenizer, with generation settings. A character out of the alphabet is an error there."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        specials = ["<pad>", "<eos>"]
        vocab = {token: i for i, token in enumerate([*specials, *self.alphabet])}
        inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=""))
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens(specials)
        inner.save(str(folder / "tokenizer.json"))
        named = {"pad_token": specials[self.pad_id], "eos_token": specials[self.eos_ids[0]]}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        generation = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


class HFTokenizer:
    """A Hugging Face tokenizer, from a local folder or a hub id.

    eos_ids: every id that ends a completion: the tokenizer's, and those of generation_config.json and config.json (chat
    models often stop at another token than the one that ends a document). pad_id: an eos id if there is no pad token.
    prompt_prefix: ids that the tokenizer itself puts before a text (BOS); empty for many. limits: of the model's input.
    unknown_id: stands for what the vocabulary has no token for; None: there is none.

    Args:
      path: of the model. chat_template: file of a template to use in place of the tokenizer's own; empty: its own.
    Raises: UserError naming `model.path` where the tokenizer cannot be loaded or has no end token, or an end token has no row
      in the model's embedding; naming `task.chat_template` where that cannot be read.
    """

    def __init__(self, path: str, chat_template: str = "") -> None:
        from grpo_jax.files import read_json
        from grpo_jax.models.folders import read_input_limits, resolve  # the embedded task needs none of it

        self.path = path
        folder = resolve(path)
        self._tokenizer = _load(path, folder)
        if chat_template:
            self._tokenizer.chat_template = _read_template(chat_template)
        self.limits = read_input_limits(folder)
        self.vocab_size: int = len(self._tokenizer)
        # In this order and without repeats: the first is what padding falls back to.
        eos_ids = _as_ids(self._tokenizer.eos_token_id)
        for name in ("generation_config.json", "config.json"):
            if (folder / name).exists():
                eos_ids += _as_ids(read_json(folder / name).get("eos_token_id"))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        if not self.eos_ids:
            raise UserError(f"model.path = {path!r}: no end token; set eos_token_id in its generation_config.json")
        self.check_ids(self.eos_ids, "a completion's end")
        pad_id = self._tokenizer.pad_token_id
        # Nothing reads padding, masks tell it apart: so it need not be an error that a pad token was added without a row.
        if pad_id is None or not self._has_row(pad_id):
            pad_id = self.eos_ids[0]
        self.pad_id: int = pad_id
        self.prompt_prefix = _prompt_prefix(self._tokenizer)
        # Some name their end token here, which stands for no unknown text: a byte-level vocabulary knows all.
        unknown_id = self._tokenizer.unk_token_id
        self.unknown_id: int | None = None if unknown_id in (*self.eos_ids, self.pad_id) else unknown_id

    @property
    def has_chat_template(self) -> bool:
        """True if `chat` will work; base models often have no template."""
        return self._tokenizer.chat_template is not None

    @property
    def chat_template(self) -> str:
        """The template's text; of several, that for chats without tools. Empty if there is none."""
        template = self._tokenizer.chat_template or ""
        return template if isinstance(template, str) else template.get("default", "")

    def encode(self, text: str) -> list[int]:
        """Text -> ids, with no special tokens added. Raises UserError if a token has no row in the model's embedding."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the tokenizers library raises nothing more special
            raise UserError(f"model.path = {self.path!r}: {self._without_token(text)}: {_line(error)}") from error
        self.check_ids(ids, f"the text {_around(text)}")
        return ids

    def _without_token(self, text: str) -> str:
        """Say which character of a text the tokenizer refuses, or that it refuses the text."""
        for char in dict.fromkeys(text):
            try:
                self._tokenizer.encode(char, add_special_tokens=False)
            except Exception:
                return f"its tokenizer has no token for {char!r}, in the text {_around(text)}"
        return f"its tokenizer refuses the text {_around(text)}"

    def encode_prompt(self, text: str) -> list[int]:
        """Text -> ids as the tokenizer itself begins a text: behind one BOS, if it writes one; never with an end token."""
        # Not the tokenizer's own call: some write an end token behind a text, and there the model would have nothing to add. A
        # text that brings its own BOS gets no second one.
        ids, prefix = self.encode(text), list(self.prompt_prefix)
        if ids[: len(prefix)] == prefix:
            return ids
        return prefix + ids

    def check_ids(self, ids: Sequence[int], what: str) -> None:
        """Raise UserError if the embedding has no row for an id. what: uses these ids, for the message."""
        # JAX would take the last row for it: another token's, and nothing would show it.
        if not len(ids) or self._has_row(max(ids)):
            return
        beyond = next(i for i in ids if not self._has_row(i))
        token = self._tokenizer.convert_ids_to_tokens(int(beyond))
        raise UserError(
            f"model.path = {self.path!r}: {what} has the token {token!r}, id {beyond}, but the embedding has "
            f"{self.limits.num_embeddings} rows (vocab_size of config.json) and the tokenizer {self.vocab_size} tokens; "
            "resize the embedding, or do without the token"
        )

    def check_length(self, prompt_tokens: int, max_completion_tokens: int) -> None:
        """Check that the longest prompt and a completion are within the positions that the model was made for.

        Args:
          prompt_tokens: of the longest prompt. max_completion_tokens: the budget behind it.
        Raises: UserError if they are not. Warns where the model's RoPE scaling reaches that far.
        """
        wanted, limit = prompt_tokens + max_completion_tokens, self.limits.max_tokens
        if limit is None or wanted <= limit:
            return
        said = (
            f"the longest prompt ({prompt_tokens} tokens) and config.rollout.max_completion_tokens = {max_completion_tokens} "
            f"are {wanted} tokens, and model.path = {self.path!r} was made for max_position_embeddings = {limit}"
        )
        if wanted > (self.limits.scaled_max_tokens or limit):
            raise UserError(f"{said}; lower config.task.max_prompt_tokens or the budget")
        _log.warning("%s; its RoPE scaling stretches them to %d", said, self.limits.scaled_max_tokens)

    def _has_row(self, i: int) -> bool:
        return self.limits.num_embeddings is None or i < self.limits.num_embeddings

    def decode(self, ids: Sequence[int] | Int[Arrays, " T"]) -> str:
        """Ids -> the text that is judged: ends of turns and padding left out, spaces and other special tokens as they are."""
        # Of special tokens only the ends say nothing: <think> may be one, and a reward looks for it.
        ends = {self.pad_id, *self.eos_ids}
        return self.decode_prompt([i for i in np.asarray(ids, int).tolist() if i not in ends])

    def decode_prompt(self, ids: Sequence[int] | Int[Arrays, " T"]) -> str:
        """Ids -> text with every special token, as the model reads it."""
        # transformers would remove spaces before punctuation, and a scorer would see another text than the model wrote.
        ids = np.asarray(ids, int).tolist()
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens of the tokenizer's markup, as the ends of turns are."""
        added = self._tokenizer.added_tokens_decoder
        return frozenset(self._tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    def token(self, i: int) -> str:
        """Return the text of one token as its vocabulary writes it."""
        return self._tokenizer.convert_ids_to_tokens(int(i))

    def chat(self, messages: Sequence[Mapping[str, str]], **arguments: Any) -> list[int]:
        """Messages -> ids, as `render_chat` writes them."""
        return self.encode(self.render_chat(messages, **arguments))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        **arguments: Any,
    ) -> str:
        """Messages ({"role", "content"}) -> text through the chat template, up to where the assistant begins to speak.

        Args:
          messages: of a chat. template: in place of the tokenizer's own. arguments: of the template.
          add_generation_prompt: False: up to the end of the last message.
        Raises: UserError if the tokenizer has no template, or the template refuses these messages.
        """
        if template is None and not self.has_chat_template:
            raise UserError(
                f"model.path = {self.path!r} has no chat template: set config.task.use_chat_template = False, "
                "name a file in config.task.chat_template, or take a model tuned for chat"
            )
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **arguments,
            )
        except Exception as error:  # a template is a program: jinja's errors, and whatever it raises itself
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"model.path = {self.path!r}: its chat template refuses {roles}: {_line(error)}") from error


def _read_template(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.task.chat_template = {file!r}: cannot read it: {_line(error)}") from error


def _prompt_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before a text of its own accord."""
    probe = "a"
    try:
        tokenizer.encode(probe)
    except Exception:  # one of characters that has no letters
        special = set(tokenizer.all_special_ids)
        probe = tokenizer.decode([next(i for i in range(len(tokenizer)) if i not in special)])
    plain, whole = tokenizer.encode(probe, add_special_tokens=False), tokenizer.encode(probe)
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _around(text: str) -> str:
    """Quote a text, shortened in its middle."""
    if len(text) <= 80:
        return repr(text)
    return f"{text[:40]!r} ... {text[-40:]!r}"


def token_texts(tokenizer: Tokenizer) -> list[bytes]:
    """List what each token id adds to a text, in bytes: a byte-level token may be half of a character.

    Raises: UserError if the tokenizer joins tokens in a way of which no token has a text of its own.
    """
    if not isinstance(tokenizer, HFTokenizer):
        return [tokenizer.decode([token]).encode() for token in range(tokenizer.vocab_size)]
    inner = tokenizer._tokenizer
    kinds = _decoder_kinds(getattr(inner, "backend_tokenizer", None))
    if "ByteLevel" in kinds:
        text_of = _byte_level_text
    elif kinds & {"ByteFallback", "Metaspace"}:
        text_of = _metaspace_text
    else:
        raise UserError(
            f"config.rollout.stop: the tokenizer of model.path = {tokenizer.path!r} is neither byte-level nor sentencepiece "
            f"(decoder: {', '.join(sorted(kinds)) or 'none'}); use config.rollout.stop_ids"
        )
    vocabulary = {token: name for name, token in inner.get_vocab().items()}
    added = {token: entry.content.encode() for token, entry in inner.added_tokens_decoder.items()}
    texts = {token: text_of(name) for token, name in vocabulary.items()} | added
    return [texts.get(token, b"") for token in range(max(texts) + 1)]


def end_of_turn(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """Find the token that the chat template writes behind an assistant's message: (id, text); None if it writes none."""
    if not isinstance(tokenizer, HFTokenizer) or not tokenizer.has_chat_template:
        return None
    inner, mark = tokenizer._tokenizer, "these are the words"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = inner.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program, and may refuse these messages
        return None
    ids = tokenizer.encode(text.rpartition(mark)[2].lstrip())
    # Only a token that was added as a whole is a mark of the template; words are what the next turn begins with.
    if mark not in text or not ids or ids[0] not in inner.added_tokens_decoder:
        return None
    return ids[0], inner.added_tokens_decoder[ids[0]].content


def _decoder_kinds(backend: Any) -> set[str]:
    """List the kinds of steps that a tokenizer decodes by."""
    if backend is None or backend.decoder is None:
        return set()
    described = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in described.get("decoders", [described])}


def _byte_level_text(name: str) -> bytes:
    """Turn the name of a byte-level token into its bytes."""
    return b"".join(_BYTE_OF.get(char, char.encode()) for char in name)


def _metaspace_text(name: str) -> bytes:
    """Turn the name of a sentencepiece token into its bytes."""
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _byte_names() -> dict[str, bytes]:
    """Make the table of byte-level BPE: printable bytes are named by themselves, the others by the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF = _byte_names()


def _load(path: str, folder: Path) -> Any:
    try:
        return _auto_tokenizer().from_pretrained(folder)
    except Exception as error:  # ValueError, OSError, KeyError, TypeError: all mean the same to the user
        need = "it needs tokenizer.json and tokenizer_config.json"
        raise UserError(f"model.path = {path!r}: no tokenizer there; {need} ({_line(error)})") from error


def _auto_tokenizer() -> Any:
    """Import transformers (seconds, so only when asked for) without its advice to install torch."""
    # The variable is put back, for processes that are started later inherit it.
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(advice)
    os.environ[advice] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[advice]
        else:
            os.environ[advice] = before
    return AutoTokenizer


def _as_ids(value: int | list[int] | None) -> list[int]:
    """List end tokens; files have none, one or several of them."""
    if value is None:
        return []
    if isinstance(value, int):
        return [value]
    return list(value)


def _line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
