# SPDX-License-Identifier: Apache-2.0
"""Other people's weights: Hugging Face model directories, in and out.

    config, params = tfjax.hub.load("DIRECTORY")
    tfjax.hub.save(config, params, "DIRECTORY")
"""

from tfjax.hub.errors import HubError
from tfjax.hub.huggingface import inputs
from tfjax.hub.huggingface import load
from tfjax.hub.huggingface import read_config
from tfjax.hub.huggingface import save
