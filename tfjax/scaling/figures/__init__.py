# SPDX-License-Identifier: Apache-2.0
"""Figures, a module a kind; `tfjax.scaling.plots` draws and saves them."""
