"""Functional Flax (Linen) modules: (params, tokens) -> logits."""
