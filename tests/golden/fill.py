"""Deterministic weights and inputs from names, so that golden numbers need no stored weights.

`fill(key, shape)` is the tensor for one full checkpoint key (with its prefix, for example
"control_model.zero_convs.0.0.weight"); `arr(tag, *shape)` is a standard-normal input named `tag`.
NumPy's legacy RandomState is used because its streams are frozen across versions.
"""

import math
import zlib

import numpy as np
import torch


def _rng(name):
    return np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)


def fill(key, shape, scale=1.0):
    """`scale` multiplies weights and biases, not norm scales: small values make activations small enough for a
    normalisation's epsilon to show."""
    n = int(np.prod(shape)) if len(shape) else 1
    u = (_rng(key).random_sample(n).astype(np.float32) * 2 - 1).reshape(shape)
    if key.endswith(("embedding.weight", "positional_embedding")) or "text_projection" in key:
        u = u * 0.05
    elif len(shape) >= 2:
        u = u * math.sqrt(1.5 / int(np.prod(shape[1:])))
    elif key.endswith("bias"):
        u = u * 0.1
    else:  # norm scales and other vectors or scalars
        u = 1 + 0.1 * u
    if len(shape) >= 2 or key.endswith("bias"):
        u = u * np.float32(scale)
    return torch.from_numpy(np.ascontiguousarray(u, dtype=np.float32))


def arr(tag, *shape):
    return torch.from_numpy(_rng(tag).standard_normal(shape).astype(np.float32))
