"""Every setting with its default and, in a comment, its effect and unit. A variant's file changes what its method changes.

The argument after the colon picks the scale:

:tiny      a two-layer decoder learns sums and differences on a laptop CPU in minutes (the default; needs no network)
:llm       any Hugging Face model, --config.model.path=folder or hub id, on your task (docs/data.md)
:smollm2   the example of it: SmolLM2-135M-Instruct (`grpo-jax smollm2` fetches it) learns few-shot sums
:runlocal  :tiny shrunk to seconds, to see that a config runs
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from grpo_jax import objectives
from grpo_jax.caches import cache_folder


def get_config(scale: str = "tiny", variant: str = "grpo") -> Any:
    """The settings shared by all variants, at one scale."""
    config: Any = ConfigDict()
    # fields: begin (each is declared in grpo_jax/config/schema.py; grpo-jax fields --write=configs/base.py)
    config.seed = 0  # of weights, prompts and samples
    config.num_steps = 800  # iterations of rollout and update; -1: as suits the embedded task [steps]
    config.eval_every = 100  # steps between held-out evaluations; 0: only before and after
    config.steps_per_call = 0  # steps in one compiled call (traceable tasks); 0: rollout and update are called and timed apart
    # age of a batch when it is trained on; 1: tasks on the host score one while another is trained on [steps]
    config.async_steps = 0
    config.shuffle_rewards = False  # control experiment: rewards go to the wrong rows, nothing may be learnt

    config.objective = objective_of(variant)

    config.model = ConfigDict()
    config.model.path = ""  # Hugging Face folder or hub id; empty: a fresh decoder of the size below
    config.model.dtype = "float32"  # float32 | bfloat16; of activations and matrix products; parameters are float32 masters
    config.model.numerics = "fast"  # fast | exact; exact: sampler and learner give the same log-probs bit for bit, at a cost
    config.model.attention = "auto"  # auto | plain; auto: kernels, where an accelerator has them; plain: none, nor a TPU's draw
    # auto | none | dots | narrow | full; what is computed again: dots all but products, narrow wide ones too, auto by depth
    config.model.remat = "auto"
    config.model.router = "trained"  # trained | frozen; of a mixture of experts, where all weights are trained
    config.model.dim = 64  # width D of the fresh decoder
    config.model.num_layers = 2  # its layers L; decoding compiles each of them
    config.model.num_heads = 4  # its query heads N
    config.model.num_kv_heads = 2  # its key and value heads K
    config.model.ffn_dim = 256  # width F of its feed-forward layers

    config.lora = ConfigDict()
    config.lora.rank = 0  # of the adapters; 0: none, all weights are trained
    config.lora.alpha = 32.0  # the adapters' product is scaled by alpha / rank
    # matrices with adapters, by Hugging Face's names; ("all-linear",): all of the model
    config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.lora.use_rslora = False  # the product is scaled by alpha / sqrt(rank) instead (rsLoRA)
    config.lora.path = ""  # PEFT folder to continue from; empty: fresh adapters

    config.task = ConfigDict()
    # arithmetic | chain | countdown | maze | forks | jsonl | dataset | reasoning_gym | mixture | module:function; source of
    # questions
    config.task.name = "arithmetic"
    config.task.params = {}  # settings for a module:function, by parameter: config.task.params.level = 2
    config.task.max_prompt_tokens = 512  # longer prompts are dropped and counted [tokens]
    config.task.shuffle = True  # a new order in each epoch; False: the order of the data, for curricula; not of embedded tasks
    config.task.system_prompt = ""  # goes before every question; this and the rest of these: not of embedded tasks
    config.task.prompt_template = ""  # "{prompt} Put the answer in \boxed{}.": around every question; empty: it alone
    config.task.num_shots = 0  # worked questions before each question; they leave the training data
    config.task.assistant_prefill = ""  # text behind every prompt, with which the model's answer begins
    config.task.use_chat_template = True  # False for base models: prompts as plain text
    config.task.chat_template = ""  # file of a chat template in place of the model's; empty: the model's
    config.task.chat_template_kwargs = ""  # JSON, {"enable_thinking": false}: arguments of the chat template
    config.task.template_date = ""  # 2026-11-26: the day that a chat template writes; empty: that of the run's first start
    config.task.mixture = ""  # JSON of task "mixture": [{"weight": 2, "name": "jsonl", "jsonl": {...}, "columns": {...}}, ...]
    config.task.columns = ConfigDict()
    config.task.columns.prompt = "prompt"  # text, or chat messages [{"role": ..., "content": ...}, ...]
    # text, a number or a list of right ones; of a worked one, what follows #### or is boxed counts; empty: none
    config.task.columns.answer = "answer"
    config.task.columns.reward = ""  # chooses what a row is scored by, see reward.by_column; empty: reward.task for all rows
    config.task.arithmetic = ConfigDict()
    config.task.arithmetic.min_operand = 0  # smallest operand
    config.task.arithmetic.max_operand = 99  # largest operand; above min_operand
    config.task.arithmetic.operators = "+"  # signs that occur; "+-" is harder and needs more warm-up
    config.task.arithmetic.num_shots = 0  # worked lines before the question, other ones for each
    config.task.chain = ConfigDict()
    config.task.chain.num_terms = 6  # numbers of a sum; a step for each but the first
    config.task.chain.max_term = 4  # largest of them; more of a sum is beyond ten then, where the teacher forgets to carry
    config.task.countdown = ConfigDict()
    config.task.countdown.num_numbers = 3  # numbers to use, each once
    config.task.countdown.max_number = 20  # largest of them; num_numbers * max_number is at most 99
    config.task.maze = ConfigDict()
    config.task.maze.side = 5  # cells along each side
    config.task.maze.num_walls = 7  # cells that no path may enter, given in the prompt
    config.task.maze.min_distance = 4  # steps from start to goal at the least
    config.task.forks = ConfigDict()
    config.task.forks.num_forks = 4  # k: decisive tokens of a completion
    config.task.forks.filler_tokens = 6  # before each fork [tokens]
    config.task.forks.filler_entropy = 1.0  # of each of them, as the teacher draws it; at most log 8 [nats]
    config.task.forks.hard_digits = 3  # the highest digits, that the teacher is careless about
    config.task.jsonl = ConfigDict()
    config.task.jsonl.path = ""  # one {"prompt": ..., "answer": ...} a line
    config.task.jsonl.eval_path = ""  # held-out questions; empty: eval.num_prompts lines are held out of `path`
    config.task.dataset = ConfigDict()
    # folder of datasets.save_to_disk, a hub id or folder for datasets.load_dataset, or data files
    config.task.dataset.path = ""
    config.task.dataset.subset = ""  # the dataset's configuration, "main" of openai/gsm8k
    config.task.dataset.split = "train"  # trained on
    config.task.dataset.eval_split = ""  # held-out questions; empty: eval.num_prompts rows are held out of `split`
    config.task.dataset.eval_path = ""  # held-out questions from another folder, hub id or files; empty: from `path`
    config.task.reasoning_gym = ConfigDict()
    config.task.reasoning_gym.datasets = ("basic_arithmetic",)  # generators; several are mixed
    config.task.reasoning_gym.weights = ()  # share of each; empty: equal
    config.task.reasoning_gym.params = ""  # JSON, {"basic_arithmetic": {"max_terms": 3}}: settings of each; empty: its own
    config.task.reasoning_gym.num_train = 10_000  # questions generated for training

    config.reward = ConfigDict()
    config.reward.task = ""  # decides success; empty: math_verify, for reasoning_gym its own (embedded: always its own)
    config.reward.shaping = ""  # only added to what the advantage sees
    # JSON, {"openai/gsm8k": "math_verify", "*": "exact"}: in place of `task`, by the value of task.columns.reward; empty: the
    # column itself holds the parts
    config.reward.by_column = ""
    config.reward.reasoning_tags = ("<think>", "</think>")  # answers are looked for behind the closing one; (): none
    config.reward.params = {}  # settings for your own functions, by parameter: config.reward.params.scale = 2.0
    config.reward.regex = ConfigDict()
    config.reward.regex.pattern = ""  # must occur; its group, if it has one, must equal the answer
    config.reward.format = ConfigDict()
    config.reward.format.pattern = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"  # of a whole completion
    # those of these that the pattern names stand once: no block is repeated
    config.reward.format.once = ("<think>", "</think>", "<answer>", "</answer>")
    config.reward.choice = ConfigDict()
    config.reward.choice.options = "choices"  # column of options: texts, {"A": text, ...} or {"label": [...], "text": [...]}
    config.reward.choice.prompt = "prompt"  # column whose "A) ...", "(B) ..." are the options of a row without a column of them
    # label | index; form of the row's answer: label (or text) of an option, or its index from 0
    config.reward.choice.answer = "label"
    config.reward.repetition = ConfigDict()
    config.reward.repetition.ngram_size = 3  # words in a row that count as repeated where they stand again
    config.reward.code = ConfigDict()
    # with the tests: assert statements, or what goes in and what comes out (docs/rewards.md)
    config.reward.code.column = "tests"
    config.reward.code.partial = False  # True: the share of tests that pass; False: 1 if all do
    # for all tests of a completion; the rest has failed then; below scoring.time_limit_secs [seconds]
    config.reward.code.limit_secs = 4.0
    config.reward.code.memory_limit_mb = 1024  # of each process that runs a program [MiB]
    config.reward.code.allow_network = False  # True: run programs also where the kernel cannot take the network away from them
    config.reward.judge = ConfigDict()
    config.reward.judge.url = ""  # of the API, as http://localhost:8000/v1; /chat/completions is added
    config.reward.judge.model = ""  # its name there
    # what it is asked, with {prompt}, {completion} and columns by name; empty: is it right, given {answer}
    config.reward.judge.template = ""
    config.reward.judge.pattern = r"Score: *([0-9]+(?:\.[0-9]+)?)"  # its group is the score; the last one in the reply counts
    config.reward.judge.max_score = 1.0  # the best score; rewards are scores over it
    config.reward.judge.max_tokens = 512  # of the reply [tokens]
    config.reward.judge.retries = 3  # after an answer of no use, or none; with longer and longer waits
    config.reward.judge.request_limit_secs = 30.0  # for one answer of the endpoint [seconds]
    config.reward.judge.concurrency = 8  # requests at a time from each scoring process
    config.reward.judge.cache = ""  # folder that replies are kept in, for later runs too; empty: in memory only
    config.reward.judge.api_key_env = "OPENAI_API_KEY"  # environment variable with the key; unset: none is sent
    config.reward.scoring = ConfigDict()
    config.reward.scoring.num_workers = 2  # processes, beside each process that trains
    # for one completion; one without a score by then is left out and counted [seconds]
    config.reward.scoring.time_limit_secs = 5.0
    config.reward.scoring.memory_limit_mb = 4096  # of each process, beyond what its imports take; 0: none [MiB]
    config.reward.scoring.file_limit_mb = 8192  # of each file that a reward writes; 0: none [MiB]

    config.warm_start = ConfigDict()
    config.warm_start.num_steps = 1200  # supervised steps before reinforcement; 0: none; -1: as suits the task
    config.warm_start.batch_size = 128  # worked answers in a step
    config.warm_start.learning_rate = 0.003  # peak, after a tenth of the steps
    # how often the teacher is careless, in sums forgets to carry: reinforcement has to correct it
    config.warm_start.label_noise = 0.8

    config.rollout = ConfigDict()
    config.rollout.num_prompts = 32  # P: groups in a batch
    config.rollout.group_size = 8  # G: completions of each prompt; at least 2
    config.rollout.max_completion_tokens = 6  # generation budget, stop token included; 0: as suits the embedded task [tokens]
    config.rollout.temperature = 1.0  # logits are divided by it
    config.rollout.top_k = 0  # most probable tokens that are kept; 0: all
    config.rollout.top_p = 1.0  # probability that the kept tokens reach together; 1: all tokens
    config.rollout.min_p = 0.0  # tokens below this share of the best one's probability are left out
    # logits of tokens that occurred, in the prompt too, are divided by it (negative ones multiplied)
    config.rollout.repetition_penalty = 1.0
    config.rollout.bad_ids = ()  # tokens that are never drawn
    config.rollout.bad_first_ids = ()  # tokens that are never drawn as a completion's first
    config.rollout.forced_prefix_ids = ()  # tokens that every completion begins with; they carry no gradient
    config.rollout.stop = ()  # texts that end a completion; rewards see what is before them
    config.rollout.stop_ids = ()  # tokens that end a completion, beside the model's end tokens
    # a batch's prompts are padded to 64, 128, 256 ... tokens or the task's longest (tasks of the host); 0: that only
    config.rollout.prompt_bucket_tokens = 64
    config.rollout.max_live_sequences = 0  # decoded at a time on each device, one that ends makes room for the next; 0: all

    config.dynamic_sampling = ConfigDict()
    config.dynamic_sampling.enabled = False  # refill the batch until every group's rewards differ
    config.dynamic_sampling.max_sampling_rounds = 4  # rounds of num_prompts prompts; then the step trains on the groups it has

    config.overlong = ConfigDict()
    # L_cache as a share of the budget, in whose last tokens the reward falls from 0 to -1; 0: none
    config.overlong.cache_share = 0.0
    config.overlong.cache_tokens = 0  # L_cache itself, in place of the share; 0: by the share [tokens]
    # GROP in place of it: a group is easy from this share of right answers on, 0.5 or more; 0: none
    config.overlong.easy_share = 0.0
    config.overlong.filter = False  # completions truncated by the budget leave the loss

    config.learner = ConfigDict()
    config.learner.num_epochs = 1  # passes over a batch
    config.learner.num_minibatches = 1  # optimizer steps in each pass
    # gradient accumulation in each optimizer step, on each device; 0: by the chip's memory, on CPUs 1
    config.learner.num_microbatches = 0
    # the update is compiled for 64, 128, 256 ... completion tokens and the budget; 0: that only
    config.learner.bucket_tokens = 64
    # positions whose [chunk, V] logits exist at a time; 0: what suits the device [tokens]
    config.learner.logprob_chunk_tokens = 0
    # auto | sampler | learner; whose word is the ratio's denominator; learner: that of the policy before the update, by one
    # more forward pass; auto: in bfloat16 with narrow clip, and with an importance_cap
    config.learner.old_logp = "auto"
    config.learner.importance_cap = 0.0  # tokens weigh min(exp(old_logp - sampler_logp), cap); 0: 1. Needs old_logp "learner"
    config.learner.importance_floor = 0.0  # the same weight is at least this
    # token | sequence | sequence_geometric; the weight is of a token, of a whole row, or the mean of a row's logs
    config.learner.importance_level = "token"
    config.learner.importance_outside = "truncate"  # truncate | mask; beyond the bounds the weight is the bound, or 0
    config.learner.ref_every = 0  # the KL's reference moves to the policy every so many updates; 0: it stays [steps]
    config.learner.ref_mix = 1.0  # share of the policy in the reference when it moves; below 1: TR-DPO's

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.0006  # of AdamW, at its peak
    config.optimizer.schedule = "linear"  # constant | linear | cosine; after the warm-up; linear and cosine go down to zero
    config.optimizer.warmup_steps = 10  # the learning rate rises over these optimizer steps
    config.optimizer.b1 = 0.9  # decay of the first moment
    config.optimizer.b2 = 0.999  # decay of the second moment
    config.optimizer.eps = 1e-8  # added to the root of the second moment
    config.optimizer.weight_decay = 0.0  # of matrices; norms and biases have none
    config.optimizer.max_grad_norm = 1.0  # gradients are clipped to this global norm
    # steps in a row with an update left out, as its gradient or loss is not finite; then the run stops
    config.optimizer.max_skipped_steps = 3
    config.optimizer.offload = False  # Adam's moments wait in the host's memory and are on the device only for their update

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that rows are sharded over; -1 (of one axis at most): all that the others leave
    config.mesh.fsdp = 1  # devices that rows and the weights with their optimizer state are sharded over
    config.mesh.expert = 1  # devices that rows and the experts of a mixture are sharded over; tokens travel between them
    config.mesh.context = 1  # devices that share a completion in the update, each with some of its tokens: for very long ones
    config.mesh.tensor = 1  # devices that share a row: attention heads, feed-forward width and vocabulary are sharded
    config.mesh.fsdp_min_elements = 65_536  # a layer's weight of fewer numbers is replicated over fsdp

    config.eval = ConfigDict()
    config.eval.num_prompts = 512  # held-out questions
    config.eval.num_samples = 4  # completions of each at rollout.temperature, beside the greedy one; 0: greedy only
    config.eval.batch_size = 128  # prompts at a time

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 100  # steps between checkpoints; 0: only at the end and on SIGTERM
    config.checkpoint.keep = 2  # newest checkpoints kept; 0: one to resume from, and none of a finished run
    config.checkpoint.keep_every = 0  # those of its multiples are kept too; 0: none [steps]
    # the best by this metric is kept too, and saved when it is found: "eval/success"; empty: none
    config.checkpoint.keep_best = ""

    config.log = ConfigDict()
    config.log.completions_every = 10  # steps between samples in completions.jsonl; 0: none
    config.log.num_groups = 2  # groups in each sample
    config.log.trackers = ("tensorboard",)  # experiment trackers, any of tensorboard, wandb, trackio, mlflow
    config.log.project = "grpo_jax"  # the project that trackers file the run under
    config.log.callbacks = ()  # module:Class of your own, told of steps, evaluations, samples and checkpoints
    # fields: end

    scales = {"tiny": tiny, "llm": llm, "smollm2": smollm2, "runlocal": runlocal}
    if scale not in scales:
        raise ValueError(f"unknown scale {scale!r} after the colon; known: {', '.join(scales)}")
    scales[scale](config)
    return config


def objective_of(variant: str) -> Any:
    """The fields of a variant's objective; what they mean: grpo_jax/objectives/variants.py."""
    objective: Any = ConfigDict(objectives.get(variant).to_dict())
    kinds = {"entropy_clip": tuple, "dual_clip": float, "max_off_policy_kl": float, "entropy_target": float}
    for field, kind in kinds.items():
        if objective[field] is None:  # a bare None could not be set from the command line
            objective[field] = placeholder(kind)
    return objective


def changes_to(variant: str) -> dict[str, Any]:
    """The fields that make GRPO's objective into the variant's, as a set of a sweep has them."""
    wanted, grpo = (objectives.get(name).to_dict() for name in (variant, "grpo"))
    return {f"objective.{field}": value for field, value in wanted.items() if value != grpo[field]}


def tiny(config: Any) -> None:
    """The settings above, with the numbers that suit the embedded task; for sums they are those above."""
    config.num_steps = -1
    config.warm_start.num_steps = -1
    config.rollout.max_completion_tokens = 0


def llm(config: Any) -> None:
    """Any real language model: what changes against the decoder of :tiny, which is fresh and small."""
    config.model.path = placeholder(str)
    config.warm_start.num_steps = 0
    config.task.arithmetic.num_shots = 4
    config.num_steps = 200
    config.eval_every = 20
    config.rollout.num_prompts = 8
    config.rollout.max_completion_tokens = 256
    config.optimizer.learning_rate = 1e-6
    config.eval.num_prompts = 64
    config.eval.num_samples = 2
    config.eval.batch_size = 32
    config.checkpoint.every = 20
    config.log.completions_every = 5


def smollm2(config: Any) -> None:
    """The example of :llm: few-shot sums below 50, which SmolLM2-135M-Instruct gets right about one time in five."""
    llm(config)
    config.model.path = str(cache_folder() / "SmolLM2-135M-Instruct")
    config.task.arithmetic.min_operand = 0
    config.task.arithmetic.max_operand = 50
    config.num_steps = 80
    config.rollout.max_completion_tokens = 6
    config.optimizer.learning_rate = 1e-5


def runlocal(config: Any) -> None:
    """Seconds, to see that everything runs."""
    config.num_steps = 3
    config.eval_every = 2
    config.rollout.max_completion_tokens = 0
    config.model.dim = 32
    config.model.num_layers = 1
    config.model.ffn_dim = 64
    config.task.arithmetic.max_operand = 9
    config.warm_start.num_steps = 300
    config.warm_start.batch_size = 32
    config.warm_start.learning_rate = 1e-2
    config.rollout.num_prompts = 8
    config.eval.num_prompts = 16
    config.eval.batch_size = 16
    config.checkpoint.every = 2
    config.log.completions_every = 1
