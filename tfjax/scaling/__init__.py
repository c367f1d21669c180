# SPDX-License-Identifier: Apache-2.0
"""Scaling laws from run records: tables, fits, frontiers, figures, report.

Reads files only, and computes on the host in float64.
"""

from tfjax.scaling.approaches import compare as compare
from tfjax.scaling.design import Prior as Prior
from tfjax.scaling.design import suggest as suggest
from tfjax.scaling.downstream import TwoStep as TwoStep
from tfjax.scaling.fit import default_holdout as default_holdout
from tfjax.scaling.fit import fit as fit
from tfjax.scaling.forms import from_function as from_function
from tfjax.scaling.forms import Law as Law
from tfjax.scaling.forms import Parameter as Parameter
from tfjax.scaling.forms import Term as Term
from tfjax.scaling.records import load as load
from tfjax.scaling.records import load_table as load_table
from tfjax.scaling.records import RecordError as RecordError
from tfjax.scaling.result import Fit as Fit
from tfjax.scaling.table import TableError as TableError
