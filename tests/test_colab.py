"""The notebooks in colab/: clean, in step with the guide, and run from the first cell to the last at the smallest scale."""

import ast
import json
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient

from grpo_jax.config.validation import TARGETS
from grpo_jax.models.families import read_architecture
from grpo_jax.models.lora import LoRA
from grpo_jax.models.peft import load_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.tools.advantages import FIVE, TITLES
from tests import programs
from tests.hf_models import torch_model
from tests.test_docs import DISPLAY, ENGLISH, blocks, config_of_command, prose, section_of, sections
from tests.test_tasks_host import TEMPLATE, save_hf_tokenizer

FILES = sorted((programs.ROOT / "colab").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(name):
    return nbformat.read(programs.ROOT / "colab" / f"{name}.ipynb", as_version=4)


def text_of(notebook, kind):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


# ------------------------------------------------------------------------------------------------------------ as files


@notebooks
def test_nothing_is_stored_but_the_source_a_line_each(file):
    raw = json.loads(file.read_text(encoding="utf-8"))
    nbformat.validate(raw)
    assert file.read_text(encoding="utf-8") == json.dumps(raw, indent=1, ensure_ascii=False) + "\n"
    assert len({cell["id"] for cell in raw["cells"]}) == len(raw["cells"]) > 10
    for cell in raw["cells"]:
        assert all("\n" not in line.removesuffix("\n") for line in cell["source"]), cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
            assert len(cell["source"]) <= 20, cell["id"]


@notebooks
def test_everything_is_defined_in_the_package(file):
    code = re.sub(r"^( *)[%!].*$", r"\1pass", text_of(read(file.stem), "code"), flags=re.M)
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node.lineno for node in ast.walk(ast.parse(code)) if isinstance(node, defined)]


def test_nobody_is_sent_to_an_address_that_is_not_there():
    """Until the project has a public address there is no badge, and notebooks install from a wheel or the clone."""
    texts = [programs.ROOT / "README.md", programs.ROOT / "setup.py", *FILES]
    assert not [file.name for file in texts if re.search(r"OWNER|colab\.research\.google\.com/github", file.read_text())]
    for file in FILES:
        assert "wheels or clones" in text_of(read(file.stem), "code")


@notebooks
def test_notebooks_go_through_the_front_door(file):
    """What a notebook imports of this package, a user may rely on."""
    own = re.findall(r"^(?:from|import) (grpo_jax.*)$", text_of(read(file.stem), "code"), re.M)
    assert set(own) <= {"grpo_jax", "grpo_jax import objectives"} and own


@notebooks
@pytest.mark.parametrize("device", ["a GPU", "a TPU", None])
def test_an_accelerator_that_jax_does_not_see_is_an_error(file, device):
    (cell,) = [cell.source for cell in read(file.stem).cells if cell.id == "hardware"]
    names = {"gpu": device == "a GPU", "tpu": device == "a TPU"}
    if device is None:
        exec(cell, names)
        return
    with pytest.raises(RuntimeError, match=rf"has {device}, and jax .* does not see it.*pip install --upgrade.*restart"):
        exec(cell, names)


def test_the_formulas_are_those_of_the_guide():
    """Each variant has its section, whose formulas stand in the guide's section of it or in what all variants share."""
    text = text_of(read("grpo_variants"), "markdown")
    shared = DISPLAY.findall(prose(dict(sections(ENGLISH, 2))["What all variants share"]))
    ours = [(title, DISPLAY.findall(body)) for title, body in sections(text, 3)]
    assert [title for title, _ in ours] == [TITLES[name] for name in FIVE]
    for name, (title, formulas) in zip(FIVE, ours, strict=True):
        assert formulas, title
        assert set(formulas) <= {*shared, *DISPLAY.findall(prose(section_of(name, ENGLISH)))}, title
    assert sum(map(len, (formulas for _, formulas in ours))) == len(DISPLAY.findall(text)) - 1
    assert {formula for formula in DISPLAY.findall(text)} & set(shared), "the objective that all share"


def test_the_command_for_a_real_model():
    (block,) = blocks(text_of(read("grpo_variants"), "markdown"), "bash")
    train, show = re.sub(r"\\\n\s*", "", block).splitlines()
    config = config_of_command(train)
    assert config.model.path == "Qwen/Qwen2.5-0.5B-Instruct" and config.lora.rank == 16
    assert config.objective.advantage == "token_entropy"
    assert show.split()[-1] in train


# -------------------------------------------------------------------------------------------------------- from end to end


def executed(name, folder, monkeypatch, parameters):
    """The notebook after Run all in an empty folder, with other parameters, as if the package were installed."""
    notebook = read(name)
    (place,) = [i for i, cell in enumerate(notebook.cells) if cell.metadata.get("tags") == ["parameters"]]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in parameters.items())))
    monkeypatch.setenv("PYTHONPATH", str(programs.ROOT))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=1 {programs.COMPILED_QUICKLY}")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def shown(notebook, cell_id, kind):
    """What a cell has displayed of one MIME type, in order."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def printed(notebook, cell_id):
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_the_variants_from_end_to_end(tmp_path, monkeypatch):
    """Two steps a run and little to compile, which is what takes the time."""
    changes = {"num_steps": 2, "eval_every": 0, "eval.num_samples": 0, "log.completions_every": 0}
    changes |= {"warm_start.num_steps": 0, "objective.kl_coef": 0.0, "dynamic_sampling.enabled": False}
    notebook = executed("grpo_variants", tmp_path, monkeypatch, {"SCALE": "runlocal", "SEEDS": (0,), "CHANGES": changes})
    assert [line.split()[0] for line in printed(notebook, "table").splitlines()] == ["variant", *FIVE]
    assert shown(notebook, "heat-map", "image/png")
    assert "5 finished" in printed(notebook, "sweep") and "2 finished" in printed(notebook, "crossed")
    runs = (tmp_path / "runs" / "variants" / "runs").glob("*/summary.json")
    steps = {file.parent.name: json.loads(file.read_text())["steps"] for file in runs}
    assert steps == {f"{name}-seed0": 2 for name in (*FIVE, "grpo-gtpo_constant")}
    (page,) = shown(notebook, "verdict", "text/html")
    assert all(f"{name} against grpo is open" in page for name in FIVE[1:])
    assert page.count("<tr>") == 1 + len(FIVE) and page.count("<img ") == 4
    assert "gtpo_constant against grpo" in shown(notebook, "crossed-report", "text/html")[0]


@pytest.mark.slow
def test_a_language_model_from_end_to_end(tmp_path, monkeypatch):
    model = tmp_path / "model"
    save_hf_tokenizer(model, {}, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE)
    torch_model("qwen2 tied", vocab_size=259, num_hidden_layers=1).save_pretrained(model)
    settings = {"MODEL": str(model), "SCALE": "runlocal", "MAX_TOKENS": 32, "SHAPING": "length"}
    notebook = executed("llm_lora", tmp_path, monkeypatch, settings)
    (answers,) = shown(notebook, "answers-after", "text/html")
    assert answers.count("<tr>") == 1 + 8 and answers.count("State the final answer") == 8
    assert "step 3/3" in printed(notebook, "train")
    (curve,) = shown(notebook, "train", "text/html")
    assert "3 steps, held-out success 0.000 to" in curve and "data:image/png" in curve
    (page,) = shown(notebook, "show", "text/html")
    assert "srcdoc=" in page and "dataset" in page and "<script" not in page
    lora = LoRA(rank=16, alpha=32.0, targets=TARGETS)
    adapters = load_adapters(str(tmp_path / "runs" / "llm_lora" / "adapters"), ModelDef(read_architecture(model), lora=lora))
    moved = [abs(x).max() > 0 for path, x in jax.tree_util.tree_leaves_with_path(adapters) if "lora_b" in str(path)]
    assert len(moved) == len(TARGETS) and all(moved), "training has left the adapters as they were"
