#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs tfjax with its test tools and runs all tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "test"
exec "$python" -m pytest -n auto --durations=10 "$@"
