"""The tests. Kernels for GPUs run as plain Python where there is none, which Triton must know when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
