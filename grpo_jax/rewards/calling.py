"""Ways of calling a reward function, told from its signature, so that functions written for TRL and verl run as they are.

    form            told by                     is also given, by name                                  returns
    one completion  `completion`                `item`, or columns of the row                           a score
    group           `completions` and `item`    `item`                                                  a list of scores
    TRL             `completions`, no `item`    columns as lists, `prompts`; `**kwargs`: all columns    a list of scores
    verl            `solution_str`              `data_source`, `ground_truth`, `extra_info`             a score
    verl, batch     `solution_strs`             the same in the plural, as lists                        a list of scores

All of them may also name `prompt`, `step`, `completion_ids` and the settings of config.reward.params, and may be `async def`.
A score is a number, None (no opinion), or a dict with one of these under "score"; an exception in a list has cost one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

FLOAT32_MAX = 3.4028234e38
Score = float | Exception | None  # finite; what was raised about one of a group; no opinion


class Form(NamedTuple):
    """A way of calling. told_by: the parameter that shows it. is_group: it takes the completions of a prompt together."""

    told_by: str
    is_group: bool
    about: str


ONE = Form("completion", False, "for one completion")
GROUP = Form("completions", True, "for all completions of a prompt")
TRL = Form("completions", True, "as TRL does")
VERL = Form("solution_str", False, "as verl does")
VERL_BATCH = Form("solution_strs", True, "as verl's batches are")
# The names that a form gives a value to, columns and settings aside.
NAMES = {
    ONE: ("completion", "item", "prompt", "completion_ids", "step"),
    GROUP: ("completions", "item", "prompt", "completion_ids", "step"),
    TRL: ("completions", "prompts", "completion_ids", "trainer_state", "step"),
    VERL: ("solution_str", "data_source", "ground_truth", "extra_info", "prompt", "completion_ids", "step"),
    VERL_BATCH: ("solution_strs", "data_sources", "ground_truths", "extra_infos", "prompt", "completion_ids", "step"),
}
# In TRL's **kwargs, beside the columns.
REST_OF_TRL = ("prompts", "completion_ids", "trainer_state")


class Request(NamedTuple):
    """A question put to a function.

    item: the row. completions: of one prompt; one of them unless the form is a group's. prompt: text, or chat messages.
    ids: tokens of each completion, or None where nobody asked. step: updates done.
    """

    item: Mapping[str, Any]
    completions: Sequence[str]
    prompt: Any = None
    ids: Sequence[Sequence[int]] | None = None
    step: int = 0

    def of_one(self, index: int) -> Request:
        """Return the same question about one of the completions."""
        ids = None if self.ids is None else [self.ids[index]]
        return self._replace(completions=[self.completions[index]], ids=ids)


class Calling(NamedTuple):
    """The way of calling one function.

    given: parameters that hold what the form gives. columns: parameters that hold a column of the data.
    settings: bound by name. has_rest: it takes **kwargs: all settings, and in TRL's form all columns.
    positional: parameters that cannot be given by name, in order. note: what a person should know about it, or nothing.
    """

    form: Form
    given: tuple[str, ...]
    columns: tuple[str, ...]
    settings: Mapping[str, Any]
    has_rest: bool
    positional: tuple[str, ...] = ()
    note: str = ""

    @property
    def gives_all_columns(self) -> bool:
        """True if every column of the row is handed over."""
        return self.has_rest and self.form is TRL

    @property
    def wants_prompt(self) -> bool:
        """True if the prompt is needed: handed over, or, in TRL's form, to tell if completions are messages."""
        return self.form is TRL or "prompt" in self.given

    @property
    def wants_ids(self) -> bool:
        """True if the tokens of the completions are handed over."""
        return self.gives_all_columns or "completion_ids" in self.given

    def describe(self, name: str) -> str:
        """Say in one line how a function is called."""
        rest = ["**columns"] * self.gives_all_columns
        given = ", ".join([*self.given, *self.columns, *self.settings, *rest])
        return f"{name} is called {self.form.about}: {given}{self.note}"


def plan_call(
    name: str, signature: inspect.Signature, columns: Collection[str] | None = None, settings: Mapping[str, Any] | None = None
) -> Calling:
    """Tell from a signature how a function is called.

    Args:
      name: of the function, for messages. signature: its own.
      columns: names of the data's columns; None: not known, any name may be one.
      settings: of config.reward.params, or a built-in part's own; those that the function names are bound.
    Returns: the Calling.
    Raises: TypeError naming the parameter that cannot be given.
    """
    settings = settings or {}
    parameters = signature.parameters.values()
    named = {each.name: each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    form = _form_of(name, named, signature)
    context = NAMES[form]
    has_item = "item" in context and "item" in named
    given, from_row, bound = [], [], {}
    for parameter in named.values():
        is_needed = parameter.default is parameter.empty
        # A function that has the whole row is given no column beside it, whatever its parameters are called.
        is_column = not has_item and (parameter.name in columns if columns is not None else is_needed)
        if parameter.name in settings and (is_column and columns is not None):
            raise TypeError(f"parameter `{parameter.name}` is a column of the data and also a setting; rename the setting")
        # What shows the form is always given; of the rest a setting of that name is what was meant.
        is_set = parameter.name in settings and parameter.name not in (form.told_by, "item")
        if is_set:
            bound[parameter.name] = settings[parameter.name]
        elif parameter.name in context:
            given.append(parameter.name)
        elif is_column:
            from_row.append(parameter.name)
        elif is_needed:
            raise TypeError(_cannot_be_given(parameter.name, name, form, has_item, columns))
    has_rest = any(each.kind is each.VAR_KEYWORD for each in parameters)
    if has_rest:
        bound = {**settings, **bound}
    by_place = [each.name for each in named.values() if each.kind is each.POSITIONAL_ONLY and each.name in (*given, *from_row)]
    note = ""
    if columns is not None and "data_source" in given and "data_source" not in columns:
        note = ' (data_source is "": the data has no such column)'
    return Calling(form, tuple(given), tuple(from_row), bound, has_rest, tuple(by_place), note)


def _form_of(name: str, named: Collection[str], signature: inspect.Signature) -> Form:
    """Tell the form by the parameters' names. Raises TypeError where none fits."""
    for form in (ONE, VERL, VERL_BATCH):
        if form.told_by in named:
            return form
    if "completions" in named:
        return GROUP if "item" in named else TRL
    first = next(iter(signature.parameters.values()), None)
    advice = "call it `completion`, or `completions` for a whole group, or `solution_str` as verl does"
    if first is None:
        raise TypeError(f"{name} has no parameters; it needs one for what is scored: {advice}")
    raise TypeError(f"parameter `{first!s}` of {name} says nothing about what is scored: {advice}")


def _cannot_be_given(parameter: str, name: str, form: Form, has_item: bool, columns: Collection[str] | None) -> str:
    """Say what a parameter might have been."""
    known = f"is none of {', '.join(NAMES[form])}"
    if has_item:
        known += ", and columns are in `item`"
    elif columns is not None:
        known += f", no column of the data ({', '.join(sorted(columns))})"
    return f"parameter `{parameter}` of {name} {known}, and there is no config.reward.params.{parameter}"


def call(function: Callable[..., Any], calling: Calling, request: Request, wait: Callable[[Any], Any]) -> list[Score]:
    """Call a function about a request.

    Args:
      function: of the user. calling: from `plan_call`. request: with one completion, or a group's.
      wait: awaitable -> its result, for functions that are `async def`.
    Returns: a score for each completion; None is no opinion.
    Raises: what the function raises; TypeError or ValueError if what it returned are no such scores.
    """
    arguments = arguments_of(calling, request)
    by_place = [arguments.pop(name) for name in calling.positional]
    result = function(*by_place, **arguments)
    if inspect.isawaitable(result):
        result = wait(result)
    if not calling.form.is_group:
        return [as_score(result)]
    return _as_scores(result, len(request.completions))


def arguments_of(calling: Calling, request: Request) -> dict[str, Any]:
    """Return the arguments by name."""
    form = calling.form
    arguments = {**calling.settings, **{name: GIVEN[name](form, request) for name in calling.given}}
    columns = calling.columns
    if calling.gives_all_columns:
        # All columns but those that TRL gives under names of its own.
        others = [name for name in request.item if name not in (*NAMES[form], "prompt", "completion")]
        columns = tuple(dict.fromkeys((*columns, *others)))
        arguments |= {name: GIVEN[name](form, request) for name in REST_OF_TRL}
    for name in columns:
        # Rows of one file may have different columns; a missing one is None, as in a table.
        arguments[name] = _spread(request.item.get(name), form, request)
    return arguments


def _spread(value: Any, form: Form, request: Request) -> Any:
    """Return a value of the row as the form gives it: once, or for each completion."""
    return [value] * len(request.completions) if form.is_group else value


def _completions(form: Form, request: Request) -> list[Any]:
    """Return the completions, for TRL as messages where the prompt is a chat."""
    if form is TRL and isinstance(request.prompt, list | tuple):
        return [[{"role": "assistant", "content": text}] for text in request.completions]
    return list(request.completions)


def _ids(form: Form, request: Request) -> list[Any]:
    """Return the tokens of each completion, or of the only one."""
    ids = [list(each) for each in request.ids or [()] * len(request.completions)]
    return ids if form.is_group else ids[0]


def _ground_truth(form: Form, request: Request) -> Any:
    """Return the right answer, from verl's layout of a row or from a plain one."""
    item = request.item
    model = item.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        return _spread(model["ground_truth"], form, request)
    return _spread(item.get("ground_truth", item.get("answer")), form, request)


def _data_source(form: Form, request: Request) -> Any:
    """Return the name of the row's data: text always, as in verl, for functions look what it begins with."""
    return _spread(request.item.get("data_source", ""), form, request)


def _extra_info(form: Form, request: Request) -> Any:
    """Return the row's dict of anything else."""
    return _spread(dict(request.item.get("extra_info") or {}), form, request)


# What each form gives, by the parameter's name. An item is a copy: what a function does to it is no other part's business.
GIVEN: Mapping[str, Callable[[Form, Request], Any]] = {
    "completion": lambda form, request: request.completions[0],
    "solution_str": lambda form, request: request.completions[0],
    "completions": _completions,
    "solution_strs": _completions,
    "item": lambda form, request: dict(request.item),
    "prompt": lambda form, request: request.prompt,
    "prompts": lambda form, request: [request.prompt] * len(request.completions),
    "completion_ids": _ids,
    "step": lambda form, request: request.step,
    "trainer_state": lambda form, request: SimpleNamespace(global_step=request.step),
    **dict.fromkeys(("data_source", "data_sources"), _data_source),
    **dict.fromkeys(("ground_truth", "ground_truths"), _ground_truth),
    **dict.fromkeys(("extra_info", "extra_infos"), _extra_info),
}


def _as_scores(result: Any, num: int) -> list[Score]:
    """Turn what a group's function returned into scores. Raises TypeError or ValueError."""
    if isinstance(result, str | bytes | Mapping | set | frozenset) or not hasattr(result, "__iter__"):
        raise TypeError(f"the function returned {_short(result)} for {num} completions, not a list with a score for each")
    # A tensor of no axes has __iter__ too, and raises TypeError here.
    scores = [as_score(each) for each in result]
    if len(scores) != num:
        raise ValueError(f"the function returned {len(scores)} scores for {num} completions")
    return scores


def as_score(value: Any) -> Score:
    """Turn what a function returned for one completion into a score. Raises TypeError or ValueError."""
    # As `asyncio.gather` has them with return_exceptions: this completion has failed, and the others of the group have not.
    if isinstance(value, Exception):
        return value
    if isinstance(value, Mapping):
        if "score" not in value:
            raise TypeError(f'the function returned {_short(value)}, a dict without "score"')
        value = value["score"]
    if value is None:
        return None
    # float("0.5") would pass, but a function that returns text has returned the wrong thing.
    if isinstance(value, str | bytes | tuple | list):
        raise TypeError(f'the function returned {_short(value)}, not a number, None or {{"score": number}}')
    score = float(value)
    if not abs(score) <= FLOAT32_MAX:  # written so that NaN fails too
        raise ValueError(f"the function returned {score}, not a finite number")
    return score


def _short(value: Any) -> str:
    return f"{value!r:.80}"
