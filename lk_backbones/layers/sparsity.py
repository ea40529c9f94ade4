"""Weights kept at zero: which a network has, how many each layer keeps, which ones, and how they change places.

A mask is a bool tensor of its weight's shape, true where the weight is pruned, that is, held at zero. Sources: SET
(Mocanu et al., 2018), SNIP (Lee et al., ICLR 2019), RigL (Evci et al., ICML 2020), SLaK (Liu et al., ICLR 2023).
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lk_backbones.weights.errors import nearest, shorten

__all__ = [
    "apportion",
    "choose_weights",
    "count_nonzero_parameters",
    "exchange",
    "lowest",
    "pack_mask",
    "plain_name",
    "unpack_mask",
]

_NEVER = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


# ---- of a network ----


def count_nonzero_parameters(module: nn.Module) -> int:
    """Count the parameters of a network that are not zero, which is what papers on sparse networks report.

    Args:
        module: Any network, with values: none on the meta device.

    Returns:
        The number, each shared parameter counted once, to be set beside ``sum(p.numel() for p in parameters())``.
    """
    return sum(int(torch.count_nonzero(parameter.detach())) for parameter in module.parameters())


def plain_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` adds to it."""
    return name.replace("_orig_mod.", "")


def choose_weights(
    module: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Choose trainable weights of a network by name.

    Args:
        module: Any network.
        layers: Shell-style patterns, as for `list_encoders`, of the names of layers or of parameters; ``None`` for the
            weights of convolutions, of linear layers and of attention: every parameter of two or more dimensions called
            ``weight`` or ``…_weight``, but for those of embeddings and norms and those that are vectors really (all
            dimensions but one of size 1). Parameters of less than two dimensions are never chosen.
        exclude: Patterns of what not to choose.

    Returns:
        Parameters by name, in the network's order, without frozen ones; a shared one has the first of its names.

    Raises:
        ValueError: If a pattern matches nothing, with names that are near, or if nothing is left.
    """
    names: dict[nn.Parameter, list[str]] = {}
    ordinary = set()
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, parameter in owner.named_parameters(prefix, recurse=False):
            if parameter.ndim > 1:
                names.setdefault(parameter, []).append(plain_name(key))
                vector = parameter.numel() == max(parameter.shape)
                if key.endswith("weight") and not vector and not isinstance(owner, _NEVER):
                    ordinary.add(parameter)
    found = {
        pattern: {p for p, own in names.items() if any(_matches(name, pattern) for name in own)}
        for pattern in [*(layers or ()), *exclude]
    }
    for pattern, matched in found.items():
        if not matched:
            known = dict.fromkeys(part for own in names.values() for name in own for part in _parts_of(name))
            raise ValueError(
                f"no layer with weights of two or more dimensions matches {pattern!r}"
                f"{nearest(pattern.strip('*?.'), known)}; patterns are shell-style and match whole names, such as "
                f"'*.{next(iter(known), 'conv')}*'"
            )
    chosen = ordinary if layers is None else set().union(*(found[pattern] for pattern in layers))
    chosen = chosen.difference(*(found[pattern] for pattern in exclude))
    trainable = {own[0]: p for p, own in names.items() if p in chosen and p.requires_grad}
    if not trainable:
        raise ValueError(
            f"no weights are left to be sparse with layers={layers} and exclude={list(exclude)}"
            + ("; those that are chosen are frozen" if chosen else "")
        )
    return trainable


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def _parts_of(name: str) -> list[str]:
    """Return what a pattern may have meant: parts of a name, its layer's name and itself."""
    return [*name.split(".")[-2::-1], name.rpartition(".")[0], name]


# ---- masks ----


def apportion(total: int, shares: Sequence[int], capacities: Sequence[int]) -> list[int]:
    """Divide a number among layers in proportion, exactly, and no more to each than it can take.

    What is over of a layer that is full is divided among the others, as for the densities of Erdős–Rényi kernels
    (RigL, appendix "ERK"); fractions go to those with the largest remainders.

    Args:
        total: Number to divide, at most the sum of the capacities.
        shares: What to divide in proportion to, positive.
        capacities: The most that each can take.

    Returns:
        One number for each, which add up to ``total``.
    """
    given = dict.fromkeys(range(len(shares)), 0)
    unfilled = list(given)
    while unfilled:
        whole = sum(shares[i] for i in unfilled)
        full = [i for i in unfilled if total * shares[i] > capacities[i] * whole]
        if not full:
            given |= {i: total * shares[i] // whole for i in unfilled}
            rest = total - sum(given[i] for i in unfilled)
            for i in sorted(unfilled, key=lambda i: -(total * shares[i] % whole))[:rest]:
                given[i] += 1
            break
        given |= {i: capacities[i] for i in full}
        total -= sum(capacities[i] for i in full)
        unfilled = [i for i in unfilled if i not in full]
    return list(given.values())


def lowest(scores: Tensor, number: int) -> Tensor:
    """Return a mask of the ``number`` lowest scores, exactly that many, of the shape of ``scores``."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if 2 * number <= len(mask):
        mask[scores.flatten().topk(number, largest=False, sorted=False).indices] = True
    else:  # the fewer, the faster
        mask[:] = True
        mask[scores.flatten().topk(len(mask) - number, sorted=False).indices] = False
    return mask.view(scores.shape)


def exchange(weight: Tensor, pruned: Tensor, number: int, scores: Tensor) -> Tensor:
    """Prune the weights of least magnitude and let as many of all pruned ones grow again, in one layer.

    As in RigL and SLaK a weight may be chosen again at once, and then goes on as it was.

    Args:
        weight: Weight of any shape.
        pruned: Its mask.
        number: How many to prune, at most as many as are left.
        scores: Those with the highest grow; positive or 0.

    Returns:
        The new mask, with as many pruned weights as before.
    """
    magnitude = weight.detach().abs().float().masked_fill(pruned, torch.inf)
    candidates = pruned | lowest(magnitude, number)
    scores = scores.masked_fill(~candidates, -1)
    grown = scores.flatten().topk(number, sorted=False).indices
    candidates.view(-1)[grown] = False
    return candidates


def pack_mask(mask: Tensor) -> dict[str, Any]:
    """Return a mask as a checkpoint holds it: its ``shape``, and ``pruned``, bits in ``(ceil(n / 8),)`` uint8."""
    return {"shape": list(mask.shape), "pruned": torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))}


def unpack_mask(packed: object, shape: Sequence[int]) -> Tensor:
    """Return the mask that `pack_mask` has packed.

    Args:
        packed: What a checkpoint holds.
        shape: Shape of the weight.

    Returns:
        The mask, on the CPU.

    Raises:
        ValueError: If it is none of that shape; the message begins with a verb.
    """
    if not isinstance(packed, dict) or not isinstance(bits := packed.get("pruned"), Tensor):
        raise ValueError(f"is {shorten(packed)}, not a shape and bits")
    if packed.get("shape") != list(shape):
        raise ValueError(f"is of shape {shorten(packed.get('shape'))}, its weight of {list(shape)}")
    number = int(np.prod(shape, dtype=np.int64))
    expected = (-(-number // 8),)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != expected or bits.layout != torch.strided or bits.is_meta:
        kind = str(bits.dtype).partition(".")[2]
        raise ValueError(f"is a tensor of {tuple(bits.shape)} {kind}, not of {expected} uint8 with values")
    unpacked = np.unpackbits(bits.cpu().numpy())
    if unpacked[number:].any():
        raise ValueError(f"has bits beyond its {number} weights")
    return torch.from_numpy(unpacked[:number].astype(bool)).view(tuple(shape))
