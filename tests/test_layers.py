"""The package is a house of rooms on floors: imports go down only, without a circle, and the pure core knows arrays alone."""

import ast
import functools
import graphlib
import pathlib
import re
import sys

from tests import mutate

PACKAGE = pathlib.Path(__file__).parent.parent / "grpo_jax"

# From the bottom up. A module imports from its own room and from rooms that stand above it in this list.
GROUND = ("errors", "types", "metrics", "masking", "rng", "caches", "knobs", "files", "imports", "screen")
FLOORS = (
    GROUND,
    ("parallel", "objectives", "analysis"),
    ("models",),
    ("config",),
    ("configs",),
    ("rollout",),
    ("learner",),
    ("rewards",),
    ("tasks",),
    ("training",),
    ("tools",),
    ("__main__", "__init__"),
)
PURE = (
    "objectives",
    "rollout",
    "masking",
    "rng",
    "metrics",
    "learner.logprobs",
    "learner.advantage_diagnostics",
    "learner.batching",
)
PURE_MAY_IMPORT = {"jax", "numpy", "flax", "jaxtyping", "grpo_jax"}


@functools.cache
def modules():
    """Dotted name without the package -> file."""
    files = sorted(PACKAGE.glob("**/*.py"))
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file):
    """Modules that a file imports, wherever in it; of `from x import y` x.y if that is a module, else x."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("grpo_jax.") in modules() else node.module


def own_imports(file):
    """Those of the package's own modules, without the package's name."""
    return [name.removeprefix("grpo_jax.") for name in imports(file) if name.startswith("grpo_jax.")]


def room_of(module):
    return module.split(".")[0]


def test_imports_go_down_only():
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    seen = 0
    for module, file in modules().items():
        assert room_of(module) in height, f"{file}: give its room a place in FLOORS"
        for imported in own_imports(file):
            here, there = room_of(module), room_of(imported)
            seen += 1
            is_down = here == there or height[there] < height[here] or (here in GROUND and there in GROUND)
            assert is_down, f"{file} imports {imported}, which is not below it"
    assert seen > 200


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(own_imports(file)) - {module} for module, file in modules().items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which shows the circle
    assert len(order) >= len(graph)


def test_the_pure_core_imports_arrays_and_nothing_else():
    seen = 0
    for module, file in modules().items():
        if module in PURE or room_of(module) in PURE:
            seen += 1
            for imported in imports(file):
                top = imported.split(".")[0]
                assert top in PURE_MAY_IMPORT or top in sys.stdlib_module_names, f"{file} imports {imported}"
    assert seen > 10


def test_few_files_lie_flat_and_none_is_long():
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    long = {str(file): n for file in modules().values() if (n := file.read_text().count("\n")) > 500}
    assert not long


def test_the_package_imports_nothing_of_the_clone_around_it():
    for file in modules().values():
        outside = [name for name in imports(file) if name.split(".")[0] in ("experiments", "configs", "tests")]
        assert not outside, f"{file} imports {outside[0]}, which an installed package has not"


def test_the_list_of_seeded_bugs_fits_the_code():
    """`make mutate` takes long and is run rarely: what it replaces must still be there."""
    assert [name for name, file, old, *_ in mutate.BUGS if old not in (mutate.ROOT / file).read_text()] == []


def test_the_tours_of_the_house_lead_through_eight_files_at_most():
    """CONTRIBUTING.md follows a reward and a token: every function it names is in the file it names."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    tours = text.split("### One ")[1:3]
    assert len(tours) == 2
    for tour in tours:
        rows = re.findall(r"^\| \d \| `(grpo_jax/[\w/]+\.py)` \| (.*) \|$", tour, re.M)
        assert 5 <= len({file for file, _ in rows}) == len(rows) <= 8
        for file, text_of_row in rows:
            tree = ast.parse((PACKAGE.parent / file).read_text())
            defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            named = [part for name in re.findall(r"`([\w.]+)`", text_of_row) for part in name.split(".")]
            assert named and set(named) <= defined, f"{file}: {set(named) - defined}"
