# SPDX-License-Identifier: Apache-2.0
"""Training: step, sharding, optimizer, checkpoints, loop, tracking."""

from tfjax.train.loop import run
from tfjax.train.records import RunRecord
