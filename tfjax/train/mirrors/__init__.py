# SPDX-License-Identifier: Apache-2.0
"""A run's records elsewhere: in wandb, in TensorBoard files.

Everything here reads run directories and writes mirrors of them; it imports
neither JAX nor the rest of tfjax. That a run has a mirror is
`tfjax.train.tracking`'s to arrange.
"""
