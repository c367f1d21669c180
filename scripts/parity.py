# SPDX-License-Identifier: Apache-2.0
"""Prints how far our models are from transformers', on the same weights.

    scripts/parity.py [--families=gpt2,llama]

A row a case: largest differences of hidden states and logits (absolute) and of
gradients (relative to each tensor's largest), in float32. Needs torch and
transformers, which the `test` extra brings. Exits 1 where a limit is passed, 2
where nothing can be compared.
"""

import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Nothing is to be fetched, and all is small.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# pylint: disable=wrong-import-position
from absl import app
from absl import flags

from tfjax import commandline
from tfjax.hub import parity

_FAMILIES = flags.DEFINE_list(
    "families", sorted({case.family for case in parity.CASES}),
    "which to compare")


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return commandline.refuse(f"unknown argument {arguments[1]!r}")
  if problem := parity.unavailable():
    return commandline.refuse(f"{problem}; the `test` extra brings it")
  cases = [case for case in parity.CASES if case.family in _FAMILIES.value]
  if not cases:
    return commandline.refuse(f"no cases of {', '.join(_FAMILIES.value)}")
  parity.quiet()
  print(f"{'family':<12}{'case':<42}{'hidden':>9}{'logits':>9}"
        f"{'gradients':>11}")
  passed = True
  for case in cases:
    with tempfile.TemporaryDirectory() as directory:
      error = parity.compare(case, parity.reference(case), directory)
    passed &= error.within_limits()
    print(f"{case.family:<12}{case.name:<42}{error.hidden:>9.1e}"
          f"{error.logits:>9.1e}{error.gradients:>11.1e}"
          f"{'' if error.within_limits() else '  too far'}", flush=True)
  print(f"limits: {parity.LIMITS.hidden:.0e} absolute, "
        f"{parity.LIMITS.gradients:.0e} relative (gradients)")
  return 0 if passed else 1


if __name__ == "__main__":
  app.run(main)
