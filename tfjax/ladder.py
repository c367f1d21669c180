# SPDX-License-Identifier: Apache-2.0
"""The size ladder: one dial, a name, gives width, depth and heads.

Names are the non-embedding parameters, 12 layers width^2, rounded. From
"85M" on the shapes are those of GPT-2 (Radford et al. 2019, Table 2) and
GPT-3 (Brown et al. 2020, Table 2.1).
"""

# name: (d_model, num_layers, num_heads)
LADDER = {
    "3k": (16, 1, 1),
    "6k": (16, 2, 1),
    "14k": (24, 2, 1),
    "25k": (32, 2, 2),
    "55k": (48, 2, 3),
    "98k": (64, 2, 4),
    "147k": (64, 3, 4),
    "197k": (64, 4, 4),
    "332k": (96, 3, 6),
    "786k": (128, 4, 4),
    "1.8M": (192, 4, 6),
    "4.7M": (256, 6, 8),
    "14M": (384, 8, 6),
    "25M": (512, 8, 8),
    "85M": (768, 12, 12),
    "302M": (1024, 24, 16),
    "708M": (1280, 36, 20),
    "1.5B": (1600, 48, 25),
    "2.5B": (2560, 32, 32),
    "6.4B": (4096, 32, 32),
    "12.6B": (5120, 40, 40),
    "174B": (12288, 96, 96),
}
