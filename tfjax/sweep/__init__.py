# SPDX-License-Identifier: Apache-2.0
"""Many runs as one thing: plan them, launch them, watch them.

    cells = sweep.product(sweep.axis("model.size", ["6k", "14k"]),
                          sweep.axis("seed", range(3)))
    specs = tfjax.sweep.plan(config, cells)
    outcomes = tfjax.sweep.launch(specs, workdir)

`plan`, `launch` and `sizes` name the functions here, not the modules that hold
them. What of it an experiment file needs is all here; `grids` computes cells.
"""

from tfjax.sweep import display
from tfjax.sweep import grids
from tfjax.sweep import ledger
from tfjax.sweep.algebra import axis
from tfjax.sweep.algebra import chain
from tfjax.sweep.algebra import choice
from tfjax.sweep.algebra import integers
from tfjax.sweep.algebra import log_uniform
from tfjax.sweep.algebra import product
from tfjax.sweep.algebra import sample
from tfjax.sweep.algebra import uniform
from tfjax.sweep.algebra import where
from tfjax.sweep.algebra import zip  # pylint: disable=redefined-builtin
from tfjax.sweep.launch import Interrupted
from tfjax.sweep.launch import launch
from tfjax.sweep.launch import LAUNCHERS
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.plan import plan
from tfjax.sweep.plan import plan_all
from tfjax.sweep.plan import PlanError
from tfjax.sweep.process import LaunchError
from tfjax.sweep.sizes import place
from tfjax.sweep.sizes import sizes
from tfjax.sweep.specs import RunSpec

__all__ = [
    "axis", "chain", "choice", "display", "grids", "integers", "Interrupted",
    "launch", "LAUNCHERS", "LaunchError", "ledger", "log_uniform", "Observer",
    "Outcome", "place", "plan", "plan_all", "PlanError", "product", "RunSpec",
    "sample", "sizes", "uniform", "where", "zip"]
