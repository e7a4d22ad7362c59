"""The package is layered: imports go down only, and the pure core knows neither files nor processes."""

import ast
import pathlib

from tests import mutate

PACKAGE = pathlib.Path(__file__).parent.parent / "grpo_jax"

# From the bottom up. A module may import what stands above it in this list, or its own siblings.
LAYERS = (
    ("errors", "caches", "types", "metrics", "estimates", "statistics", "masking", "rng", "spmd", "linear"),
    ("objectives", "sampling"),
    ("strict", "reward_parts", "validation"),
    ("logprobs", "config"),
    ("models", "sharding", "hosts", "optimizer"),
    ("decoding",),
    ("rollout", "score", "rewards", "dynamic_sampling", "batching", "credit"),
    ("tasks", "scorers"),
    ("warm_start", "train_step"),
    ("build", "iteration"),
    ("evaluate", "checkpoint", "completions", "runlog", "plots", "provenance"),
    ("run", "cohort"),
    ("trainer",),
    ("lockstep",),
)
PURE = (
    "objectives",
    "masking",
    "logprobs",
    "sampling",
    "rewards",
    "dynamic_sampling",
    "score",
    "decoding",
    "rollout",
    "credit",
    "spmd",
    "rng",
    "linear",
)
PURE_MAY_IMPORT = {"jax", "numpy", "flax", "jaxtyping", "grpo_jax"}


def modules():
    for file in sorted(PACKAGE.glob("**/*.py")):
        yield file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file


def imports(file):
    """Modules imported while running; those under TYPE_CHECKING do not count."""
    tree = ast.parse(file.read_text())
    skipped = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    hidden = {id(n) for block in skipped for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "grpo_jax":
                yield from (f"grpo_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_go_down_only():
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    seen = 0
    for name, file in modules():
        if name == "__init__":
            continue
        assert name in height, f"{file}: give it a place in LAYERS"
        for imported in imports(file):
            if imported.startswith("grpo_jax."):
                other = imported.split(".")[1]
                seen += 1
                assert other == name or height[other] <= height[name], f"{file} imports {imported} from above"
    assert seen > 50


def test_the_pure_core_imports_arrays_and_nothing_else():
    import sys

    for name, file in modules():
        if name in PURE:
            for imported in imports(file):
                top = imported.split(".")[0]
                assert top in PURE_MAY_IMPORT or top in sys.stdlib_module_names, f"{file} imports {imported}"


def test_files_stay_readable():
    long = {str(file): n for _, file in modules() if (n := file.read_text().count("\n")) > 300}
    assert not long


def test_the_list_of_seeded_bugs_fits_the_code():
    """`make mutate` takes long and is run seldom: what it replaces must still be there."""
    assert [name for name, file, old, *_ in mutate.BUGS if old not in (mutate.ROOT / file).read_text()] == []
