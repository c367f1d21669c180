# SPDX-License-Identifier: Apache-2.0
"""Many runs as one thing: plan them, launch them, watch them.

    specs = tfjax.sweep.plan(config, overrides)
    outcomes = tfjax.sweep.launch(specs, workdir)

`plan`, `launch` and `sizes` name the functions here, not the modules that hold
them.
"""

from tfjax.sweep import display
from tfjax.sweep import ledger
from tfjax.sweep.launch import Interrupted
from tfjax.sweep.launch import launch
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.plan import axis
from tfjax.sweep.plan import chain
from tfjax.sweep.plan import plan
from tfjax.sweep.plan import PlanError
from tfjax.sweep.plan import product
from tfjax.sweep.plan import RunSpec
from tfjax.sweep.plan import zip_
from tfjax.sweep.process import LaunchError
from tfjax.sweep.sizes import place
from tfjax.sweep.sizes import sizes

__all__ = [
    "axis", "chain", "display", "Interrupted", "launch", "LaunchError",
    "ledger", "Observer", "Outcome", "place", "plan", "PlanError", "product",
    "RunSpec", "sizes", "zip_"]
