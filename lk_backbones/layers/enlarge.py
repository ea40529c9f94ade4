"""Large kernels for any network: its depthwise convolutions, and a larger kernel added to each that starts at zero."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.fold import merge_into
from lk_backbones.layers.peripheral import expand_cells, peripheral_grid
from lk_backbones.ops import depthwise_conv2d

__all__ = [
    "EnlargedConv2d",
    "EnlargementPlan",
    "check_kernel_sizes",
    "enlarge_kernels",
    "enlarged_parameters",
    "original_name",
    "plan_enlargement",
]

ModuleType = TypeVar("ModuleType", bound=nn.Module)
Size = tuple[int, int]

# torch.fx records each as one call.
torch.fx.wrap("depthwise_conv2d")
torch.fx.wrap("expand_cells")

# By these timm.utils.reparameterize_model finds what folds itself, reading the weights of the convolutions inside.
_FOLDS = ("fuse", "reparameterize", "switch_to_deploy")
_LARGE = "large_weight"
_CENTRE = 2  # taps around the centre of a peripheral kernel that have weights of their own


class EnlargedConv2d(DepthwiseConv2d):
    """Depthwise convolution with a second, larger kernel around the same centre; the two are computed as one.

    What is learned is a sum of two branches, the kernel that was there and a large one that starts at zero. Neither has
    a norm, so the sum of the branches is the convolution with the sum of the kernels, and costs no more than that.
    ``weight`` and ``bias`` keep their names and values, so that weights published for the convolution as it was still
    fit. `reparameterize` leaves a `DepthwiseConv2d` with the large kernel, the same names and no others.

    `enlarge_kernels` makes them of the convolutions of a network.

    Args:
        *args: As `DepthwiseConv2d`, for the small kernel: odd sizes, stride 1 and zeros as padding that keep the map's
            size.
        large_kernel_size: Rows and columns of the large kernel, in taps: with a dilation it reaches further. Odd, and
            no smaller than the small one.
        peripheral: Whether the outer taps of the large kernel share weights, as `enlarge_kernels`.
        **kwargs: As `DepthwiseConv2d`.

    Attributes:
        large_weight: The large kernel, ``(C, 1, *large_kernel_size)``; one value for each cell if there is a grid.
        grid: Widths of the cells that share a weight along both axes, or ``None`` if every tap has its own.

    Raises:
        ValueError: If the convolution is none that keeps the map's size, or the large kernel does not fit it.
    """

    def __init__(self, *args: Any, large_kernel_size: int | Size, peripheral: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (problem := _problem(self)) is not None:
            raise ValueError(f"EnlargedConv2d needs a convolution that can be enlarged, got {problem}")
        rows, columns = _pair(large_kernel_size)
        if any(large % 2 == 0 or large < small for large, small in zip((rows, columns), self.kernel_size, strict=True)):
            raise ValueError(
                f"large_kernel_size must be odd and at least the kernel_size {_shown(self.kernel_size)}, "
                f"got {_shown((rows, columns))}"
            )
        self._add_large_kernel((rows, columns), peripheral)

    def _add_large_kernel(self, size: Size, peripheral: bool) -> None:
        self.large_kernel_size = size
        # a strip has few weights as it is
        shared = peripheral and size[0] == size[1]
        self.grid: list[int] | None = peripheral_grid(size[0], min(_CENTRE, size[0] // 2)) if shared else None
        if self.grid is not None:
            size = (len(self.grid), len(self.grid))
        # zero, and yet it learns: its gradient is a product of the input and the output's gradient
        zeros = self.weight.detach().new_zeros(self.out_channels, 1, *size)
        self.large_weight = nn.Parameter(zeros, requires_grad=self.weight.requires_grad)

    def merged_weight(self) -> Tensor:
        """Return the sum of both kernels, ``(C, 1, *large_kernel_size)``, with the gradients of both."""
        rows = (self.large_kernel_size[0] - self.kernel_size[0]) // 2
        columns = (self.large_kernel_size[1] - self.kernel_size[1]) // 2
        large = self.large_weight if self.grid is None else expand_cells(self.large_weight, self.grid)
        return large + F.pad(self.weight, (columns, columns, rows, rows))

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` or ``(C, H, W)`` to the same shape."""
        weight = self.merged_weight()
        if torch.jit.is_scripting():
            return F.conv2d(input, weight, self.bias, padding="same", dilation=self.dilation, groups=self.groups)
        else:  # the else keeps TorchScript's compiler from looking inside
            return self._fast_convolution(input, weight)

    @torch.jit.unused
    def _fast_convolution(self, input: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(input, weight, self.bias, (self.dilation[0], self.dilation[1]))

    def reparameterize(self) -> None:
        """Add the small kernel to the centre of the large one and become a `DepthwiseConv2d`, in place."""
        large = self.large_weight if self.grid is None else expand_cells(self.large_weight, self.grid)
        merged = merge_into(large, self.weight)
        self.weight = nn.Parameter(merged, requires_grad=self.weight.requires_grad)
        self.kernel_size = self.large_kernel_size
        if self.padding != "same":
            self.padding = tuple(step * (size // 2) for step, size in zip(self.dilation, self.kernel_size, strict=True))
            self._reversed_padding_repeated_twice = [pad for pad in reversed(self.padding) for _ in range(2)]
        del self.large_weight, self.large_kernel_size, self.grid
        self.__class__ = DepthwiseConv2d  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        grid = "" if self.grid is None else f", grid={self.grid}"
        return f"{super().extra_repr()}, large_kernel_size={self.large_kernel_size}{grid}"


@dataclass
class EnlargementPlan:
    """What `enlarge_kernels` does to a model; printing it gives a summary.

    Attributes:
        enlarged: Kernel before and after, rows and columns, by the name of the convolution.
        left_alone: Reason, by the name of every other convolution with groups. Dense ones are no concern of it.
    """

    enlarged: dict[str, tuple[Size, Size]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for every pair of sizes, and for every reason to leave something alone."""
        sizes = {name: f"{_shown(old)} to {_shown(new)}" for name, (old, new) in self.enlarged.items()}
        lines = [f"{len(self.enlarged)} depthwise convolutions enlarged, {len(self.left_alone)} left alone"]
        lines += [f"  {text}: {_some(names)}" for text, names in _grouped(sizes).items()]
        lines += [f"  left alone, {text}: {_some(names)}" for text, names in _grouped(self.left_alone).items()]
        return "\n".join(lines)


def enlarge_kernels(
    model: ModuleType,
    kernel_size: int | Sequence[int],
    stages: int | Sequence[int] | None = None,
    pattern: str | Sequence[str] | None = None,
    peripheral: bool = False,
    inplace: bool = False,
) -> ModuleType:
    """Give the depthwise convolutions of any network large kernels, without a change of its outputs at the start.

    Every depthwise convolution becomes an `EnlargedConv2d`: the kernel that was there, pretrained perhaps, is kept as a
    small branch (RepLKNet, arXiv 2203.06717, section 3), and the large one around it starts at zero. Train the network
    from there, then `lk_backbones.reparameterize` leaves one large kernel each. `plan_enlargement` says beforehand what
    becomes of every convolution.

    Dilations are kept, and count between the taps of the large kernel too. Kernels keep their kind: a square grows on
    both axes, a strip of 1×k or k×1 (InceptionNeXt's) only along itself, so that it stays as cheap as a strip; of any
    other rectangle the longer side grows. What is strided, grouped otherwise, even-sized or padded otherwise than by
    the zeros that keep the map's size is left alone. So is a subclass of ``nn.Conv2d`` (timm's ``Conv2dSame``), whose
    forward may differ, and whatever lies in a module that folds itself, such as those of `lk_backbones.layers` and
    timm's RepVGG blocks: set the kernel sizes of such a network where it is built.

    Weights of the network as it was can still be loaded, with ``strict=False`` or by `lk_backbones.hub.load_weights`.
    An optimiser that was made before does not know the new parameters.

    Args:
        model: Any module, such as a timm or torchvision model, an smp model or a detector.
        kernel_size: Odd number of taps along a side of the large kernels, for all of them, or one for each of
            ``stages``.
        stages: Numbers of the stages to enlarge, counted as timm's ``out_indices`` count the levels of its
            ``feature_info``; ``None`` for all. A level's stage is what lies between it and the level before.
        pattern: Names of the convolutions to enlarge, with the wildcards of a shell, such as
            ``"*stages.2*conv_dw"``, or several; ``None`` for all.
        peripheral: Whether the outer taps of square large kernels share weights (PeLK, arXiv 2403.07589, section 3.1):
            those up to two steps from the centre have their own, outwards lie cells of 2, 4, 8, … taps along each axis
            (`lk_backbones.layers.peripheral_grid`). So 51×51 taps have 13×13 weights. The convolution costs the same.
        inplace: Whether to change ``model`` itself rather than a copy.

    Returns:
        The enlarged model.

    Raises:
        ValueError: If the kernel size is even or not larger than 1, there are no such stages, a pattern matches no
            convolution, or nothing is left to enlarge; with the reasons.
    """
    plan = plan_enlargement(model, kernel_size, stages, pattern)
    if not plan.enlarged:
        raise ValueError(f"nothing in this {type(model).__name__} can be enlarged to {kernel_size}: {_reasons(plan)}")
    model = model if inplace else copy.deepcopy(model)
    for name, (_, size) in plan.enlarged.items():
        conv: Any = model.get_submodule(name)
        # The class and a parameter are what differs; a new module would lose hooks and whatever refers to the old one.
        conv.__class__ = EnlargedConv2d
        conv._add_large_kernel(size, peripheral)
    return model


def plan_enlargement(
    model: nn.Module,
    kernel_size: int | Sequence[int],
    stages: int | Sequence[int] | None = None,
    pattern: str | Sequence[str] | None = None,
) -> EnlargementPlan:
    """Say what `enlarge_kernels` would do to a model, and what it would leave alone and why.

    Args:
        model: As `enlarge_kernels`.
        kernel_size: As `enlarge_kernels`.
        stages: As `enlarge_kernels`.
        pattern: As `enlarge_kernels`.

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: As `enlarge_kernels`, but for an empty plan.
    """
    sizes = check_kernel_sizes(kernel_size)
    convs = dict(_grouped_convolutions(model))
    patterns = [pattern] if isinstance(pattern, str) else pattern
    _check_patterns(patterns, list(convs))
    by_stage = None
    if stages is not None or len(sizes) > 1:
        by_stage = _sizes_by_stage(model, sizes, [stages] if isinstance(stages, int) else stages)

    plan = EnlargementPlan()
    for name, conv in convs.items():
        size: int | None = sizes[0] if by_stage is None else by_stage.get(name)
        if size is None:
            plan.left_alone[name] = "in another stage"
        elif patterns is not None and not any(fnmatchcase(name, p) for p in patterns):
            plan.left_alone[name] = "of another name"
        elif (problem := _problem(conv) or _folded_by(model, name)) is not None:
            plan.left_alone[name] = problem
        elif size <= max(conv.kernel_size):
            plan.left_alone[name] = f"a kernel of {_shown(conv.kernel_size)} already"
        else:
            old = _pair(conv.kernel_size)
            plan.enlarged[name] = (old, (_grown(old, 0, size), _grown(old, 1, size)))
    return plan


def enlarged_parameters(model: nn.Module) -> dict[str, str]:
    """Find the parameters that `enlarge_kernels` added to a model.

    Args:
        model: Any module.

    Returns:
        Name of the small kernel, by the name of the large one.
    """
    names = (name for name, module in model.named_modules() if isinstance(module, EnlargedConv2d))
    large = [f"{name}.{_LARGE}" if name else _LARGE for name in names]
    return {name: original_name(name) for name in large}


def original_name(name: str) -> str:
    """Return the name of the kernel that was there before, if a parameter's name is that of an added one.

    Args:
        name: ``"stages.0.conv_dw.large_weight"``, or any other name, which is returned as it is.

    Returns:
        ``"stages.0.conv_dw.weight"``.
    """
    head, _, last = name.rpartition(".")
    return name if last != _LARGE else f"{head}.weight" if head else "weight"


# ---- which convolutions ----


def _grouped_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """All that could be meant: a dense convolution mixes channels and is never enlarged."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            yield name, module


def _problem(conv: nn.Conv2d) -> str | None:
    """Say why a convolution on its own cannot be enlarged, or nothing if it can."""
    if not conv.groups == conv.in_channels == conv.out_channels:
        per_group = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        return f"not depthwise: groups of {per_group[0]} to {per_group[1]} channels"
    if hasattr(conv, _LARGE):
        return "enlarged before: fold it first"
    if type(conv) not in (nn.Conv2d, DepthwiseConv2d) and not isinstance(conv, EnlargedConv2d):
        return f"a {type(conv).__name__}, whose forward may differ"
    if _pair(conv.stride) != (1, 1):
        return f"a stride of {_shown(conv.stride)}"
    if any(size % 2 == 0 for size in conv.kernel_size):
        return f"an even kernel of {_shown(conv.kernel_size)}"
    if _pair(conv.kernel_size) == (1, 1):
        return "a kernel of 1x1, which is a scale per channel"
    same = tuple(step * (size // 2) for step, size in zip(conv.dilation, conv.kernel_size, strict=True))
    if conv.padding_mode != "zeros" or (conv.padding != "same" and conv.padding != same):
        mode = "" if conv.padding_mode == "zeros" else f" in mode '{conv.padding_mode}'"
        return f"padding {conv.padding}{mode} around a kernel of {_shown(conv.kernel_size)}"
    if "weight" not in conv._parameters:
        return "a weight that is computed (pruned, perhaps, or normalised)"
    return None


def _folded_by(model: nn.Module, name: str) -> str | None:
    """Name what folds a convolution by itself: it would read the small kernel and lose the large one."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        module = model.get_submodule(parent)
        if any(callable(getattr(module, hook, None)) for hook in _FOLDS):
            return f"in a {type(module).__name__}, which folds itself"
    return None


def check_kernel_sizes(kernel_size: int | Sequence[int]) -> list[int]:
    """Check sizes as `enlarge_kernels` takes them, before there is a model.

    Args:
        kernel_size: One size, or several.

    Returns:
        All of them.

    Raises:
        ValueError: If one is even or not larger than 1, or there is none.
    """
    sizes = [kernel_size] if isinstance(kernel_size, int) else list(kernel_size)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 3 or size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number of at least 3, got {size!r}")
    if not sizes:
        raise ValueError("kernel_size must be an odd number of at least 3, or one for each of stages, got none")
    return sizes


def _check_patterns(patterns: Sequence[str] | None, names: list[str]) -> None:
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0)
            raise ValueError(
                f"pattern '{pattern}' matches no convolution with groups"
                + (f"; the nearest of {len(names)} are {', '.join(map(repr, near))}" if near else ": there is none")
            )


def _grown(kernel: Size, axis: int, size: int) -> int:
    return size if kernel[axis] == max(kernel) else kernel[axis]


# ---- stages ----


def _sizes_by_stage(model: nn.Module, sizes: list[int], stages: Sequence[int] | None) -> dict[str, int]:
    """Return the kernel size of every module that is in one of the stages, by its name."""
    levels = list(_levels(model))
    if not levels:
        raise ValueError(
            f"stages: this {type(model).__name__} does not tell its stages, as timm's models do (feature_info); choose "
            f"layers by pattern, such as '*.2.*'"
        )
    by_name: dict[str, int] = {}
    for count, stage_of in levels:
        chosen = range(count) if stages is None else stages
        if wrong := [stage for stage in chosen if not -count <= stage < count]:
            raise ValueError(f"stages={list(chosen)}: there is no stage {wrong[0]}, there are 0 to {count - 1}")
        if len(sizes) not in (1, len(chosen)):
            raise ValueError(
                f"kernel_size={sizes} must be one number, or one for each of the {len(chosen)} stages {list(chosen)}"
            )
        size_of = dict(
            zip((stage % count for stage in chosen), sizes if len(sizes) > 1 else sizes * len(chosen), strict=True)
        )
        by_name |= {name: size_of[stage] for name, stage in stage_of.items() if stage in size_of}
    return by_name


def _levels(model: nn.Module) -> Iterator[tuple[int, dict[str, int]]]:
    """Find the timm models inside a model: how many levels each has, and the level of every module by its name."""
    taken: list[str] = []
    for prefix, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        entries = info if isinstance(info, list) else getattr(info, "info", None)
        if not entries or any(prefix.startswith(f"{other}.") or other == "" for other in taken):
            continue
        names = [name for name, _ in module.named_modules()]
        ends = [_last(names, entry["module"]) for entry in entries]
        if any(end is not None for end in ends):  # else a wrapper, around a model that says the same by its own names
            taken.append(prefix)
            joined = [f"{prefix}.{name}" if prefix and name else prefix or name for name in names]
            yield len(ends), {name: _stage(i, ends) for i, name in enumerate(joined)}


def _last(names: list[str], module: str) -> int | None:
    """Return the place of the last of a module's parts; timm's extractors write ``stages.0`` as ``stages_0``."""
    for own in (module, module.replace(".", "_", 1)):
        places = [i for i, name in enumerate(names) if name == own or name.startswith(f"{own}.")]
        if places:
            return places[-1]
    return None


def _stage(place: int, ends: list[int | None]) -> int:
    """Return the first level that a module comes before; what comes behind the last belongs to that one."""
    there = [(stage, end) for stage, end in enumerate(ends) if end is not None]
    return next((stage for stage, end in there if place <= end), there[-1][0])


# ---- words ----


def _pair(value: int | tuple[int, ...]) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _shown(size: int | tuple[int, ...]) -> str:
    return "x".join(map(str, _pair(size)))


def _grouped(texts: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    return groups


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _reasons(plan: EnlargementPlan) -> str:
    reasons = [f"{len(names)} are left alone, {text} ({names[0]})" for text, names in _grouped(plan.left_alone).items()]
    return "; ".join(reasons) or "it has no convolutions with groups"
