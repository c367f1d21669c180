# SPDX-License-Identifier: Apache-2.0
"""What is predicted from what: tokens -> inputs, targets, weights, loss."""

from tfjax.objectives import causal

OBJECTIVES = {"causal": causal}
