# SPDX-License-Identifier: Apache-2.0
"""Peak rates of accelerators: dense bfloat16, without sparsity.

A device that is not listed has no known peak: None, never a guess. CPUs are
not listed; their rate depends on the machine and `scripts/bench.py` measures
it.
"""

# `jax.Device.device_kind` -> FLOP/s, from the vendors' data sheets.
PEAK_BFLOAT16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Peak FLOP/s of one device, or None where it is not known."""
  if dtype != "bfloat16":
    return None
  return PEAK_BFLOAT16_FLOPS.get(device_kind)
