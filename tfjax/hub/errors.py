# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of reading or writing a Hugging Face model."""


class HubError(ValueError):
  """A directory or a model that cannot be exchanged. Names what and why."""
