# SPDX-License-Identifier: Apache-2.0
"""Scaling laws from run records: tables, fits, frontiers, figures, report.

Reads files only and imports no jax.
"""

from tfjax.scaling.fit import default_holdout as default_holdout
from tfjax.scaling.fit import fit as fit
from tfjax.scaling.records import RecordError as RecordError
from tfjax.scaling.records import load as load
from tfjax.scaling.result import Fit as Fit
from tfjax.scaling.table import TableError as TableError
