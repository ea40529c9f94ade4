"""Read a weight file without running anything in it, and name what in it is not weights.

Safetensors hold tensors only. Pickles are read with ``weights_only=True``, which builds tensors and plain containers;
a file that asks for more is refused, because unpickling could run any code.
"""

import argparse
import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file

from lk_backbones.weights.errors import WeightsError, shorten

__all__ = ["WEIGHT_SUFFIXES", "Checkpoint", "check_archive", "check_stream", "read_checkpoint", "sha256_of", "unwrap"]

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
_LONGEST_KEY = 1000
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
    if not os.path.isfile(file):  # unlike Path, at ease with any text
        raise FileNotFoundError(f"there is no file {shorten(str(file), 300)}")
    if file.suffix == ".safetensors":
        try:
            return _without_companions(load_file(file, device="cpu"), file)
        except WeightsError:
            raise
        except Exception as error:  # safetensors' own error class, and OSError of the memory map
            raise WeightsError(
                f"'{file}' is not a whole safetensors file ({_first_line(error)}): it is truncated or was altered. "
                f"Fetch it again"
            ) from error
    return _without_companions(_unpickle(file), file)


def check_archive(file: Path) -> None:
    """Check an archive, as `torch.save` writes them, before anything in it is read: its checksums and sizes.

    torch does not compare the checksums, and would unpack a small file into any amount of memory.

    Args:
        file: The file; anything but such an archive passes.

    Raises:
        WeightsError: If it was damaged, or holds more than its size allows.
    """
    with file.open("rb") as stream:
        check_stream(stream, str(file))


def check_stream(stream: IO[bytes], name: str) -> None:
    """`check_archive` of a file that is open; it is left at its beginning.

    Args:
        stream: The file.
        name: What to call it in messages.

    Raises:
        WeightsError: As there.
    """
    start = stream.read(4)
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if start != b"PK\x03\x04":
        return
    try:
        with zipfile.ZipFile(stream) as archive:
            content = sum(entry.file_size for entry in archive.infolist())
            if content > size:
                raise WeightsError(
                    f"'{name}' is a compressed archive, which would grow from {size} to {content} bytes; torch.save "
                    f"writes none: unpack it yourself if you trust it"
                )
            if len(set(archive.namelist())) < len(archive.namelist()):
                raise WeightsError(f"'{name}' is an archive with two parts of one name, as torch.save never writes")
            damaged = archive.testzip()
    except WeightsError:
        raise
    except Exception as error:  # a directory of entries that makes no sense has many ways to fail
        raise WeightsError(
            f"'{name}' is no whole archive ({_first_line(error)}): it was truncated or altered"
        ) from error
    if damaged is not None:
        raise WeightsError(
            f"'{name}' is damaged: the checksum of {shorten(damaged)} in it is wrong. Fetch it again, or take an "
            f"earlier checkpoint"
        )
    stream.seek(0)


def _unpickle(file: Path) -> Any:
    check_archive(file)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = _unsafe_globals(file, error)
        if unsafe:
            raise WeightsError(
                f"'{file}' is a pickle of more than weights and is not read: loading it could run any code. It asks "
                f"for {', '.join(unsafe[:3])}. Ask its publisher for a .safetensors file; if you trust it, keep only "
                f"its state dict, in an environment where nothing can be lost: safetensors.torch.save_file("
                f"torch.load(FILE, weights_only=False)['state_dict'], 'weights.safetensors')"
            ) from error
        raise WeightsError(
            # torch's own text advises to unpickle the file, which would run what is in it
            f"'{file}' cannot be read as weights. It is truncated or no weight file; "
            f"{', '.join(WEIGHT_SUFFIXES)} are understood"
        ) from error


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"  # it may quote a name of any length from the file


def _unsafe_globals(file: Path, error: Exception) -> list[str]:
    """Return what a pickle asks for that is not allowed; nothing if it is only damaged."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not a pickle that torch wrote; an old-format pickle has no such list
        with file.open("rb") as stream:
            foreign = stream.read(1) == b"\x80" and isinstance(error, pickle.UnpicklingError)
            return ["objects of an old or foreign pickle"] if foreign else []


def unwrap(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Find the state dict in what a training script saved.

    Args:
        content: A file's content, or a state dict as it is.

    Returns:
        The state dict, and the key that it lay under, if any.
    """
    wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    return (content, None) if wrapper is None else (content[wrapper], wrapper)


def _without_companions(content: Any, file: Path) -> Checkpoint:
    """Find the state dict in a training checkpoint; name everything else."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{file}' holds a {type(content).__name__}, not weights by name")
    skipped: dict[str, list[str]] = {}
    companions: dict[str, Any] = {}
    state, wrapper = unwrap(content)
    if wrapper is not None:
        companions = {key: value for key, value in content.items() if key != wrapper}
        for key in companions:
            skipped.setdefault(_COMPANIONS.get(key, "settings and counters of the training"), []).append(str(key))
    tensors = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise WeightsError(
                f"'{file}' has the key {shorten(key)}, which is no text but a {type(key).__name__}: these are no "
                f"weights by name"
            )
        if len(key) > _LONGEST_KEY:
            raise WeightsError(f"'{file}' has a key of {len(key)} letters, {shorten(key)}: no tensor has such a name")
        if not isinstance(value, torch.Tensor):
            skipped.setdefault("not a tensor", []).append(key)
        elif key.startswith("ema_"):
            skipped.setdefault("EMA copy of the weights", []).append(key)
        elif key.startswith("data_preprocessor."):
            skipped.setdefault("mean and standard deviation of the pictures", []).append(key)
        else:
            _check_tensor(value, key, file)
            tensors[key] = value
    if not tensors:
        keys = ", ".join(shorten(key) for key in list(content)[:5])
        raise WeightsError(f"'{file}' holds no tensors by name; its keys are [{keys}]")
    for prefix in ("module.", "_orig_mod.", "module."):  # wrappers of data parallel training and torch.compile
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return Checkpoint(tensors, skipped, companions)


def _check_tensor(tensor: torch.Tensor, key: str, file: Path) -> None:
    """Refuse what is no ordinary array of numbers, each of which the file holds."""
    kind = None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        kind = f"a {type(tensor).__name__}"
    elif tensor.is_quantized:
        kind = "quantised"
    elif tensor.is_nested:
        kind = "nested"
    elif tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
    elif tensor.is_meta:
        kind = "without values (on the meta device)"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"of shape {tuple(tensor.shape)}, but the file does not hold as many numbers"
    if kind is not None:
        raise WeightsError(f"'{file}' holds no plain weights: {shorten(key)} is {kind}. Save it as an ordinary tensor")
