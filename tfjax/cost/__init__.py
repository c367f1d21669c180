# SPDX-License-Identifier: Apache-2.0
"""What a config will cost: FLOPs, and the budget that follows from it."""
