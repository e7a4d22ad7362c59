from pathlib import Path

from setuptools import find_packages, setup

# A plain install runs on the CPU and pins no accelerator: an existing jax (a TPU VM's, Colab's) is left alone.
TASKS = ["math-verify>=0.8", "reasoning-gym>=0.1.23", "datasets>=3"]
SMOLLM2 = ["gguf>=0.17"]
TRACKERS = ["wandb>=0.22", "trackio>=0.20"]
TEST = [
    "pytest>=8",
    "beartype>=0.20",
    "torch>=2.6",
    "peft>=0.15",
    "markdown-it-py>=3",
    "submitit>=1.5",
    "pytest-xdist>=3.7",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "setuptools>=70.1",  # builds the wheel that a test installs
    *TASKS,
    *SMOLLM2,
    *TRACKERS,
    "mlflow-skinny>=3",
]

setup(
    name="grpo_jax",
    version="0.1.0",
    description="Group-relative policy optimisation in JAX: GRPO, DAPO, Dr. GRPO, GTPO and GRPO-S",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # No `url` until the project has a public address.
    python_requires=">=3.11",
    packages=find_packages(include=["grpo_jax", "grpo_jax.*"]),
    entry_points={"console_scripts": ["grpo-jax=grpo_jax.tools.main:main"]},
    package_data={
        "grpo_jax.tools.show": ["page.html", "page.css", "page.js"],
        "grpo_jax.tools.report": ["page.html", "page.css"],
    },
    install_requires=[
        "cloudpickle>=3",
        "jax>=0.7.2",
        "flax>=0.11.2",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.20",
        "transformers>=4.51",
        "ml-collections>=1.0",
        "tensorboard>=2.18",
        "grain>=0.2.12",
        "huggingface_hub>=0.30",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "markdown-it-py>=3",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.12",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.7.2"],
        "tpu": ["jax[tpu]>=0.7.2"],
        # The compilers of chips that are not here (grpo-jax plan --compile --topology).
        "aot-tpu": ["jax[tpu]>=0.7.2"],
        "aot-gpu": ["jax[cuda12]>=0.7.2"],
        "tasks": TASKS,
        "smollm2": SMOLLM2,
        "trackers": [*TRACKERS, "mlflow>=3"],
        "slurm": ["submitit>=1.5"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "test": TEST,
        # pyright is a program of Node, which its extra brings as a Python package: nothing is fetched at its first run.
        "dev": [*TEST, "ruff>=0.9", "pyright[nodejs]>=1.1.390"],
    },
)
