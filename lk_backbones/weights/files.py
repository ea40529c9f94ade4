"""Read a weight file without running anything in it, and name what in it is not weights.

Safetensors hold tensors only. Pickles are read with ``weights_only=True``, which builds tensors and plain containers;
a file that asks for more is refused, because unpickling could run any code.
"""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lk_backbones.weights.errors import WeightsError

__all__ = ["WEIGHT_SUFFIXES", "Checkpoint", "read_checkpoint", "sha256_of"]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

# Plain values that training scripts keep beside the weights; building them runs no code of the file's.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")),
]
_HARMLESS += [
    (function, f"{module}.{name}")
    for module in ("numpy._core.multiarray", "numpy.core.multiarray")
    for name, function in (("scalar", np.float64(0).__reduce__()[0]), ("_reconstruct", np.zeros(1).__reduce__()[0]))
]

# Under which key training scripts keep the state dict, in the order in which they are tried.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
# Top-level entries of a training checkpoint, and what to call them.
_COMPANIONS = {
    "optimizer": "optimizer state",
    "optimizer_states": "optimizer state",
    "lr_scheduler": "optimizer state",
    "lr_schedulers": "optimizer state",
    "scheduler": "optimizer state",
    "scaler": "optimizer state",
    "amp": "optimizer state",
    "model_ema": "EMA copy of the weights",
    "state_dict_ema": "EMA copy of the weights",
    "ema": "EMA copy of the weights",
}


@dataclass
class Checkpoint:
    """Content of a weight file.

    Attributes:
        state_dict: Tensors by key, without the prefixes of wrappers (``module.``).
        skipped: What else the file holds: reason to keys.
        content: The plain values beside the weights, such as Lightning's ``hyper_parameters``; empty for safetensors.
    """

    state_dict: dict[str, torch.Tensor]
    skipped: dict[str, list[str]] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the tensors of a ``.safetensors`` file or of a pickle that holds nothing dangerous.

    Args:
        file: The file.

    Returns:
        Its tensors, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsError: If it is damaged, holds no tensors, or is a pickle of more than weights.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file '{file}'")
    if file.suffix == ".safetensors":
        try:
            return _without_companions(load_file(file, device="cpu"), file)
        except WeightsError:
            raise
        except Exception as error:  # safetensors' own error class, and OSError of the memory map
            raise WeightsError(
                f"'{file}' is not a whole safetensors file ({error}): it is truncated or was altered. Fetch it again"
            ) from error
    return _without_companions(_unpickle(file), file)


def _unpickle(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = _unsafe_globals(file)
        if unsafe:
            raise WeightsError(
                f"'{file}' is a pickle of more than weights and is not read: loading it could run any code. It asks "
                f"for {', '.join(unsafe[:3])}. Ask its publisher for a .safetensors file; if you trust it, keep only "
                f"its state dict, in an environment where nothing can be lost: safetensors.torch.save_file("
                f"torch.load(FILE, weights_only=False)['state_dict'], 'weights.safetensors')"
            ) from error
        raise WeightsError(
            f"'{file}' cannot be read as weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            f" It is truncated or no weight file; {', '.join(WEIGHT_SUFFIXES)} are understood"
        ) from error


def _unsafe_globals(file: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not a pickle that torch wrote; an old-format pickle has no such list
        with file.open("rb") as stream:
            return ["objects of an old or foreign pickle"] if stream.read(1) == b"\x80" else []


def _without_companions(content: Any, file: Path) -> Checkpoint:
    """Find the state dict in a training checkpoint; name everything else."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{file}' holds a {type(content).__name__}, not weights by name")
    skipped: dict[str, list[str]] = {}
    companions: dict[str, Any] = {}
    state: Mapping[str, Any] = content
    wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    if wrapper is not None:
        state = content[wrapper]
        companions = {key: value for key, value in content.items() if key != wrapper}
        for key in companions:
            skipped.setdefault(_COMPANIONS.get(key, "settings and counters of the training"), []).append(str(key))
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            skipped.setdefault("not a tensor", []).append(str(key))
        elif key.startswith("ema_"):
            skipped.setdefault("EMA copy of the weights", []).append(key)
        elif key.startswith("data_preprocessor."):
            skipped.setdefault("mean and standard deviation of the pictures", []).append(key)
        else:
            tensors[key] = value
    if not tensors:
        raise WeightsError(f"'{file}' holds no tensors by name; its keys are {[str(key) for key in content][:5]}")
    for prefix in ("module.", "_orig_mod.", "module."):  # wrappers of data parallel training and torch.compile
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return Checkpoint(tensors, skipped, companions)
