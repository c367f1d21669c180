# SPDX-License-Identifier: Apache-2.0
"""tfjax: scaling experiments with transformer language models in JAX."""
