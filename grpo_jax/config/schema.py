"""The configuration: one frozen dataclass a stage. Each field is declared once, with default, comment, unit and range.

configs/base.py, the list of fields (`grpo-jax fields`) and the checks of ranges are made from here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_jax.config.embedded import EMBEDDED, ChainConfig, CountdownConfig, ForksConfig, MazeConfig
from grpo_jax.knobs import Settings, knob
from grpo_jax.models.lora import TARGETS
from grpo_jax.objectives import Objective

TASKS = (*EMBEDDED, "jsonl", "dataset", "reasoning_gym", "mixture")
DTYPES = ("float32", "bfloat16")
NUMERICS = ("fast", "exact")
ATTENTIONS = ("auto", "plain")
ROUTERS = ("trained", "frozen")
REMATS = ("auto", "none", "dots", "narrow", "full")
OLD_LOGP = ("auto", "sampler", "learner")
CHOICE_ANSWERS = ("label", "index")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
SCHEDULES = ("constant", "linear", "cosine")
SAMPLER_LEVELS = ("token", "sequence", "sequence_geometric")
GRPO = Objective()
CHAIN, COUNTDOWN, MAZE, FORKS = ChainConfig(), CountdownConfig(), MazeConfig(), ForksConfig()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. With `path` (a Hugging Face folder or hub id) the architecture comes from its config.json."""

    path: str = knob("", "Hugging Face folder or hub id; empty: a fresh decoder of the size below")
    dtype: str = knob("float32", "of activations and matrix products; parameters are float32 masters", choices=DTYPES)
    numerics: str = knob("fast", "exact: sampler and learner give the same log-probs bit for bit, at a cost", choices=NUMERICS)
    attention: str = knob(
        "auto", "auto: kernels, where an accelerator has them; plain: none, nor a TPU's draw", choices=ATTENTIONS
    )
    remat: str = knob(
        "auto",
        "what is computed again: dots all but products, narrow wide ones too, auto by depth",
        choices=REMATS,
    )
    router: str = knob("trained", "of a mixture of experts, where all weights are trained", choices=ROUTERS)
    dim: int = knob(64, "width D of the fresh decoder", at_least=2, at_most=2**16)
    num_layers: int = knob(2, "its layers L; decoding compiles each of them", at_least=1, at_most=256)
    num_heads: int = knob(4, "its query heads N", at_least=1, at_most=1024)
    num_kv_heads: int = knob(2, "its key and value heads K", at_least=1, at_most=1024)
    ffn_dim: int = knob(256, "width F of its feed-forward layers", at_least=1, at_most=2**20)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of training all weights. rank 0: none."""

    rank: int = knob(0, "of the adapters; 0: none, all weights are trained", at_least=0, at_most=2**14)
    alpha: float = knob(32.0, "the adapters' product is scaled by alpha / rank", above=0, at_most=1e6)
    targets: tuple[str, ...] = knob(
        TARGETS, 'matrices with adapters, by Hugging Face\'s names; ("all-linear",): all of the model'
    )
    use_rslora: bool = knob(False, "the product is scaled by alpha / sqrt(rank) instead (rsLoRA)")
    path: str = knob("", "PEFT folder to continue from; empty: fresh adapters")


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Sums and differences as text; `num_shots` worked examples stand before the question."""

    min_operand: int = knob(0, "smallest operand", at_least=0)
    max_operand: int = knob(99, "largest operand; above min_operand")
    operators: str = knob("+", 'signs that occur; "+-" is harder and needs more warm-up')
    num_shots: int = knob(0, "worked lines before the question, other ones for each", at_least=0)


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Columns of a jsonl or dataset row, `reward_model.ground_truth` for one inside of another; rewards see all of the row."""

    prompt: str = knob("prompt", 'text, or chat messages [{"role": ..., "content": ...}, ...]')
    answer: str = knob(
        "answer", "text, a number or a list of right ones; of a worked one, what follows #### or is boxed counts; empty: none"
    )
    reward: str = knob("", "chooses what a row is scored by, see reward.by_column; empty: reward.task for all rows")


@dataclasses.dataclass(frozen=True)
class JsonlConfig:
    """Data files: JSON Lines, a JSON array, CSV, TSV or Parquet, maybe gzipped; several with commas between, or a glob."""

    path: str = knob("", 'one {"prompt": ..., "answer": ...} a line')
    eval_path: str = knob("", "held-out questions; empty: eval.num_prompts lines are held out of `path`")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A Hugging Face dataset: a folder of `save_to_disk`, or what `load_dataset` takes; or data files, as `task.jsonl` has."""

    path: str = knob("", "folder of datasets.save_to_disk, a hub id or folder for datasets.load_dataset, or data files")
    subset: str = knob("", 'the dataset\'s configuration, "main" of openai/gsm8k')
    split: str = knob("train", "trained on")
    eval_split: str = knob("", "held-out questions; empty: eval.num_prompts rows are held out of `split`")
    eval_path: str = knob("", "held-out questions from another folder, hub id or files; empty: from `path`")


@dataclasses.dataclass(frozen=True)
class ReasoningGymConfig:
    """Generators of the reasoning-gym library, mixed by weight. `params`: JSON, {generator: {setting: value}}."""

    datasets: tuple[str, ...] = knob(("basic_arithmetic",), "generators; several are mixed")
    weights: tuple[float, ...] = knob((), "share of each; empty: equal")
    params: str = knob("", 'JSON, {"basic_arithmetic": {"max_terms": 3}}: settings of each; empty: its own', is_json=True)
    num_train: int = knob(10_000, "questions generated for training", at_least=1)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The source of questions, and how they are put to the model."""

    name: str = knob("arithmetic", "source of questions", choices=TASKS, or_import=True)
    params: Settings = knob(Settings(), "settings for a module:function, by parameter: config.task.params.level = 2")
    max_prompt_tokens: int = knob(512, "longer prompts are dropped and counted", unit="tokens", at_least=1)
    shuffle: bool = knob(True, "a new order in each epoch; False: the order of the data, for curricula; not of embedded tasks")
    system_prompt: str = knob("", "goes before every question; this and the rest of these: not of embedded tasks")
    prompt_template: str = knob("", '"{prompt} Put the answer in \\boxed{}.": around every question; empty: it alone')
    num_shots: int = knob(0, "worked questions before each question; they leave the training data", at_least=0)
    assistant_prefill: str = knob("", "text behind every prompt, with which the model's answer begins")
    use_chat_template: bool = knob(True, "False for base models: prompts as plain text")
    chat_template: str = knob("", "file of a chat template in place of the model's; empty: the model's")
    chat_template_kwargs: str = knob("", 'JSON, {"enable_thinking": false}: arguments of the chat template', is_json=True)
    template_date: str = knob("", "2026-11-26: the day that a chat template writes; empty: that of the run's first start")
    mixture: str = knob(
        "", 'JSON of task "mixture": [{"weight": 2, "name": "jsonl", "jsonl": {...}, "columns": {...}}, ...]', is_json=True
    )
    columns: ColumnsConfig = ColumnsConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    chain: ChainConfig = CHAIN
    countdown: CountdownConfig = COUNTDOWN
    maze: MazeConfig = MAZE
    forks: ForksConfig = FORKS
    jsonl: JsonlConfig = JsonlConfig()
    dataset: DatasetConfig = DatasetConfig()
    reasoning_gym: ReasoningGymConfig = ReasoningGymConfig()


@dataclasses.dataclass(frozen=True)
class RegexConfig:
    """Settings of the part `regex`."""

    pattern: str = knob("", "must occur; its group, if it has one, must equal the answer")


@dataclasses.dataclass(frozen=True)
class FormatConfig:
    """Settings of the part `format`."""

    pattern: str = knob(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", "of a whole completion")
    once: tuple[str, ...] = knob(
        ("<think>", "</think>", "<answer>", "</answer>"),
        "those of these that the pattern names stand once: no block is repeated",
    )


@dataclasses.dataclass(frozen=True)
class ChoiceConfig:
    """Settings of the part `choice`."""

    options: str = knob("choices", 'column of options: texts, {"A": text, ...} or {"label": [...], "text": [...]}')
    prompt: str = knob("prompt", 'column whose "A) ...", "(B) ..." are the options of a row without a column of them')
    answer: str = knob(
        "label", "form of the row's answer: label (or text) of an option, or its index from 0", choices=CHOICE_ANSWERS
    )


@dataclasses.dataclass(frozen=True)
class RepetitionConfig:
    """Settings of the part `repetition`."""

    ngram_size: int = knob(3, "words in a row that count as repeated where they stand again", unit="words", at_least=1)


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """Settings of the part `code`: a completion's last block of Python against the tests of its row."""

    column: str = knob("tests", "with the tests: assert statements, or what goes in and what comes out (docs/rewards.md)")
    partial: bool = knob(False, "True: the share of tests that pass; False: 1 if all do")
    limit_secs: float = knob(
        4.0,
        "for all tests of a completion; the rest has failed then; below scoring.time_limit_secs",
        unit="seconds",
        above=0,
    )
    memory_limit_mb: int = knob(1024, "of each process that runs a program", unit="MiB", at_least=64, at_most=2**20)
    allow_network: bool = knob(False, "True: run programs also where the kernel cannot take the network away from them")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Settings of the part `judge`: a language model behind an OpenAI-compatible endpoint."""

    url: str = knob("", "of the API, as http://localhost:8000/v1; /chat/completions is added")
    model: str = knob("", "its name there")
    template: str = knob(
        "", "what it is asked, with {prompt}, {completion} and columns by name; empty: is it right, given {answer}"
    )
    pattern: str = knob(r"Score: *([0-9]+(?:\.[0-9]+)?)", "its group is the score; the last one in the reply counts")
    max_score: float = knob(1.0, "the best score; rewards are scores over it", above=0)
    max_tokens: int = knob(512, "of the reply", unit="tokens", at_least=1)
    retries: int = knob(3, "after an answer of no use, or none; with longer and longer waits", at_least=0, at_most=100)
    request_limit_secs: float = knob(30.0, "for one answer of the endpoint", unit="seconds", above=0, at_most=1e6)
    concurrency: int = knob(8, "requests at a time from each scoring process", at_least=1, at_most=1024)
    cache: str = knob("", "folder that replies are kept in, for later runs too; empty: in memory only")
    api_key_env: str = knob("OPENAI_API_KEY", "environment variable with the key; unset: none is sent")


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """Worker processes for rewards that run on the host."""

    num_workers: int = knob(2, "processes, beside each process that trains", at_least=1, at_most=1024)
    time_limit_secs: float = knob(
        5.0, "for one completion; one without a score by then is left out and counted", unit="seconds", above=0, at_most=1e6
    )
    memory_limit_mb: int = knob(4096, "of each process, beyond what its imports take; 0: none", unit="MiB", at_least=0)
    file_limit_mb: int = knob(8192, "of each file that a reward writes; 0: none", unit="MiB", at_least=0)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Two weighted sums of named parts (reward_expression.py), "0.2*format + my_rewards:brevity", and the parts' settings."""

    task: str = knob("", "decides success; empty: math_verify, for reasoning_gym its own (embedded: always its own)")
    shaping: str = knob("", "only added to what the advantage sees")
    by_column: str = knob(
        "",
        'JSON, {"openai/gsm8k": "math_verify", "*": "exact"}: in place of `task`, by the value of task.columns.reward; '
        "empty: the column itself holds the parts",
        is_json=True,
    )
    reasoning_tags: tuple[str, ...] = knob(("<think>", "</think>"), "answers are looked for behind the closing one; (): none")
    params: Settings = knob(Settings(), "settings for your own functions, by parameter: config.reward.params.scale = 2.0")
    regex: RegexConfig = RegexConfig()
    format: FormatConfig = FormatConfig()
    choice: ChoiceConfig = ChoiceConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    code: CodeConfig = CodeConfig()
    judge: JudgeConfig = JudgeConfig()
    scoring: ScoringConfig = ScoringConfig()


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on the task's own answers before reinforcement begins (embedded tasks only)."""

    num_steps: int = knob(
        1200, "supervised steps before reinforcement; 0: none; -1: as suits the task", unit="steps", at_least=-1
    )
    batch_size: int = knob(128, "worked answers in a step", at_least=1, at_most=2**16)
    learning_rate: float = knob(3e-3, "peak, after a tenth of the steps", at_least=0, at_most=1)
    label_noise: float = knob(
        0.8,
        "how often the teacher is careless, in sums forgets to carry: reinforcement has to correct it",
        at_least=0,
        at_most=1,
    )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The batch that is sampled, and the distribution it is drawn from."""

    num_prompts: int = knob(32, "P: groups in a batch", at_least=1, at_most=2**20)
    group_size: int = knob(8, "G: completions of each prompt; at least 2", at_most=2**16)
    max_completion_tokens: int = knob(
        6, "generation budget, stop token included; 0: as suits the embedded task", unit="tokens", at_least=0, at_most=2**20
    )
    temperature: float = knob(1.0, "logits are divided by it", at_least=1e-3, at_most=1e3)
    top_k: int = knob(0, "most probable tokens that are kept; 0: all", at_least=0)
    top_p: float = knob(1.0, "probability that the kept tokens reach together; 1: all tokens", above=0, at_most=1)
    min_p: float = knob(0.0, "tokens below this share of the best one's probability are left out", at_least=0, at_most=1)
    repetition_penalty: float = knob(
        1.0, "logits of tokens that occurred, in the prompt too, are divided by it (negative ones multiplied)", above=0
    )
    bad_ids: tuple[int, ...] = knob((), "tokens that are never drawn")
    bad_first_ids: tuple[int, ...] = knob((), "tokens that are never drawn as a completion's first")
    forced_prefix_ids: tuple[int, ...] = knob((), "tokens that every completion begins with; they carry no gradient")
    stop: tuple[str, ...] = knob((), "texts that end a completion; rewards see what is before them")
    stop_ids: tuple[int, ...] = knob((), "tokens that end a completion, beside the model's end tokens")
    prompt_bucket_tokens: int = knob(
        64,
        "a batch's prompts are padded to 64, 128, 256 ... tokens or the task's longest (tasks of the host); 0: that only",
        unit="tokens",
        at_least=0,
    )
    max_live_sequences: int = knob(
        0, "decoded at a time on each device, one that ends makes room for the next; 0: all", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class DynamicSamplingConfig:
    """DAPO eq. 11: keep sampling until the batch is full of groups whose rewards differ."""

    enabled: bool = knob(False, "refill the batch until every group's rewards differ")
    max_sampling_rounds: int = knob(4, "rounds of num_prompts prompts; then the step trains on the groups it has", at_least=1)


@dataclasses.dataclass(frozen=True)
class OverlongConfig:
    """DAPO eq. 13, or GROP (GTPO's appendix). `filter`: truncated rows leave the loss."""

    cache_share: float = knob(
        0.0,
        "L_cache as a share of the budget, in whose last tokens the reward falls from 0 to -1; 0: none",
        at_least=0,
        at_most=1,
    )
    cache_tokens: int = knob(0, "L_cache itself, in place of the share; 0: by the share", unit="tokens", at_least=0)
    easy_share: float = knob(
        0.0,
        "GROP in place of it: a group is easy from this share of right answers on, 0.5 or more; 0: none",
        at_least=0,
        at_most=1,
    )
    filter: bool = knob(False, "completions truncated by the budget leave the loss")


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The way from one batch to optimizer steps."""

    num_epochs: int = knob(1, "passes over a batch", at_least=1, at_most=1024)
    num_minibatches: int = knob(1, "optimizer steps in each pass", at_least=1, at_most=2**16)
    num_microbatches: int = knob(
        0, "gradient accumulation in each optimizer step, on each device; 0: by the chip's memory, on CPUs 1", at_least=0
    )
    bucket_tokens: int = knob(
        64,
        "the update is compiled for 64, 128, 256 ... completion tokens and the budget; 0: that only",
        unit="tokens",
        at_least=0,
    )
    logprob_chunk_tokens: int = knob(
        0, "positions whose [chunk, V] logits exist at a time; 0: what suits the device", unit="tokens", at_least=0
    )
    old_logp: str = knob(
        "auto",
        "whose word is the ratio's denominator; learner: that of the policy before the update, by one more forward pass; "
        "auto: in bfloat16 with narrow clip, and with an importance_cap",
        choices=OLD_LOGP,
    )
    importance_cap: float = knob(
        0.0, 'tokens weigh min(exp(old_logp - sampler_logp), cap); 0: 1. Needs old_logp "learner"', at_least=0, at_most=1e6
    )
    importance_floor: float = knob(0.0, "the same weight is at least this", at_least=0, at_most=1)
    importance_level: str = knob(
        "token", "the weight is of a token, of a whole row, or the mean of a row's logs", choices=SAMPLER_LEVELS
    )
    importance_outside: str = knob("truncate", "beyond the bounds the weight is the bound, or 0", choices=("truncate", "mask"))
    ref_every: int = knob(
        0, "the KL's reference moves to the policy every so many updates; 0: it stays", unit="steps", at_least=0
    )
    ref_mix: float = knob(1.0, "share of the policy in the reference when it moves; below 1: TR-DPO's", above=0, at_most=1)

    @property
    def microbatches(self) -> int:
        """num_microbatches; 1 where it is not decided yet (`training.fit`)."""
        return max(1, self.num_microbatches)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a schedule after it."""

    learning_rate: float = knob(6e-4, "of AdamW, at its peak", at_least=0, at_most=1)
    schedule: str = knob("linear", "after the warm-up; linear and cosine go down to zero", choices=SCHEDULES)
    warmup_steps: int = knob(10, "the learning rate rises over these optimizer steps", unit="steps", at_least=0)
    b1: float = knob(0.9, "decay of the first moment", at_least=0, at_most=0.999999)
    b2: float = knob(0.999, "decay of the second moment", at_least=0, at_most=0.999999)
    eps: float = knob(1e-8, "added to the root of the second moment", at_least=1e-20, at_most=1)
    weight_decay: float = knob(0.0, "of matrices; norms and biases have none", at_least=0, at_most=1)
    max_grad_norm: float = knob(1.0, "gradients are clipped to this global norm", above=0, at_most=1e9)
    max_skipped_steps: int = knob(
        3, "steps in a row with an update left out, as its gradient or loss is not finite; then the run stops", at_least=1
    )
    offload: bool = knob(False, "Adam's moments wait in the host's memory and are on the device only for their update")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis."""

    data: int = knob(-1, "devices that rows are sharded over; -1 (of one axis at most): all that the others leave")
    fsdp: int = knob(1, "devices that rows and the weights with their optimizer state are sharded over")
    expert: int = knob(1, "devices that rows and the experts of a mixture are sharded over; tokens travel between them")
    context: int = knob(1, "devices that share a completion in the update, each with some of its tokens: for very long ones")
    tensor: int = knob(1, "devices that share a row: attention heads, feed-forward width and vocabulary are sharded")
    fsdp_min_elements: int = knob(2**16, "a layer's weight of fewer numbers is replicated over fsdp", at_least=0)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> devices along it, as `parallel.sharding.make_mesh` takes them."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "expert": self.expert}
        return {**sizes, "context": self.context, "tensor": self.tensor}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    num_prompts: int = knob(512, "held-out questions", at_least=1, at_most=2**24)
    num_samples: int = knob(4, "completions of each at rollout.temperature, beside the greedy one; 0: greedy only", at_least=0)
    batch_size: int = knob(128, "prompts at a time", at_least=1, at_most=2**16)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in the run's folder."""

    every: int = knob(100, "steps between checkpoints; 0: only at the end and on SIGTERM", unit="steps", at_least=0)
    keep: int = knob(2, "newest checkpoints kept; 0: one to resume from, and none of a finished run", at_least=0)
    keep_every: int = knob(0, "those of its multiples are kept too; 0: none", unit="steps", at_least=0)
    keep_best: str = knob("", 'the best by this metric is kept too, and saved when it is found: "eval/success"; empty: none')


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """The sampled text that is kept, `num_groups` groups every `completions_every` steps, and who else is told."""

    completions_every: int = knob(10, "steps between samples in completions.jsonl; 0: none", unit="steps", at_least=0)
    num_groups: int = knob(2, "groups in each sample", at_least=1)
    trackers: tuple[str, ...] = knob(("tensorboard",), f"experiment trackers, any of {', '.join(TRACKERS)}")
    project: str = knob("grpo_jax", "the project that trackers file the run under")
    callbacks: tuple[str, ...] = knob((), "module:Class of your own, told of steps, evaluations, samples and checkpoints")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = knob(0, "of weights, prompts and samples", at_least=0, below=2**31)
    num_steps: int = knob(800, "iterations of rollout and update; -1: as suits the embedded task", unit="steps", at_least=-1)
    eval_every: int = knob(100, "steps between held-out evaluations; 0: only before and after", unit="steps", at_least=0)
    steps_per_call: int = knob(
        0,
        "steps in one compiled call (traceable tasks); 0: rollout and update are called and timed apart",
        unit="steps",
        at_least=0,
    )
    async_steps: int = knob(
        0,
        "age of a batch when it is trained on; 1: tasks on the host score one while another is trained on",
        unit="steps",
        at_least=0,
    )
    shuffle_rewards: bool = knob(False, "control experiment: rewards go to the wrong rows, nothing may be learnt")
    objective: Objective = GRPO
    model: ModelConfig = ModelConfig()
    lora: LoRAConfig = LoRAConfig()
    task: TaskConfig = TaskConfig()
    reward: RewardConfig = RewardConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    overlong: OverlongConfig = OverlongConfig()
    learner: LearnerConfig = LearnerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_steps * self.learner.num_epochs * self.learner.num_minibatches

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (JSON-ready but for tuples), the inverse of `parse_config`. Functions are written by name."""
        return {**dataclasses.asdict(self), "objective": self.objective.to_dict()}
