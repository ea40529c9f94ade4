"""Chance that depends on one seed, whichever generator a library draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the global generators of Python, NumPy and torch's CPU begin with a seed, and go on as before afterwards.

    timm's and torchvision's augmentations draw from all three. Generators of accelerators are left alone.

    Args:
        seed: The seed, at least 0.
    """
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would seed accelerators too
        yield
