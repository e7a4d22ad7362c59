"""The wheel: its only top-level name is grpo_jax, and it works beside a user's own packages of any name."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from grpo_jax import __version__
from tests import programs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing of the build stays in the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "grpo_jax"):
        (source / name).symlink_to(programs.ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([*command, str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_has_one_name_and_all_its_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"grpo_jax"}
    tracked = subprocess.run(["git", "ls-files", "grpo_jax"], cwd=programs.ROOT, capture_output=True, text=True, check=False)
    assert set(tracked.stdout.split()) <= set(names)


def test_an_installed_wheel_trains_beside_packages_of_the_same_names_as_a_clones_folders(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    home = tmp_path / "home"
    for name in ("configs", "experiments", "tests"):
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text("raise ImportError('this is the user\\'s own package')\n")
    (home / "mine.py").write_text(
        "from grpo_jax.configs import gtpo\n\ndef get_config(scale='runlocal'):\n    return gtpo.get_config(scale)\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "grpo_jax", "train", "--config=mine.py", "--workdir=w", "--config.num_steps=1"]
    command += ["--config.warm_start.num_steps=1", "--config.eval.num_prompts=4", "--config.eval.num_samples=0"]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = programs.summary(pathlib.Path(home / "w"))
    assert summary["steps"] == 1
    assert summary["version"] == __version__
    assert summary["commit"] == ""
