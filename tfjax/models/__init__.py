# SPDX-License-Identifier: Apache-2.0
"""Functional Flax (Linen) modules: (params, tokens) -> logits."""
