"""The operator's part of ``gpu.py``: its shapes, its candidates, their errors against float64, their times."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from case import Case
from gpu_device import OUT_OF_MEMORY, DeviceLost, Stopwatch, explain_failure, free_memory
from torch import Tensor

from lk_backbones.ops import _cuda, _operators, _paths, depthwise_conv2d, explain
from lk_backbones.ops._tuning import KINDS, TOLERANCES, Kind, disagreement

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
PYTORCH = ("native", "native-contiguous", "native-channels_last", "cudnn", "aten")
# Together in one task of a worker: output and gradient of the input take the same compiled kernels.
KINDS_TOGETHER: tuple[tuple[Kind, ...], ...] = (("forward", "input_gradient"), ("weight_gradient",))


@dataclass(frozen=True)
class Setting:
    """A shape in a type and a memory format.

    Attributes:
        case: The shape.
        dtype: A key of `DTYPES`; ``"tf32"`` is float32 whose products may be rounded to TF32, ``"float32"`` is not.
        channels_last: Whether the maps are laid out in channels_last.
    """

    case: Case
    dtype: str = "bfloat16"
    channels_last: bool = False

    @property
    def label(self) -> str:
        return f"{self.case.label} {self.dtype}{' channels_last' if self.channels_last else ''}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.case.batch, self.case.channels, self.case.height, self.case.width

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.case.kernel_height, self.case.kernel_width

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> Setting:
        return Setting(Case(**content["case"]), content["dtype"], content["channels_last"])

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Allow or forbid TF32 in convolutions as the setting says."""
        before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        torch.backends.cudnn.conv.fp32_precision = "tf32" if self.dtype == "tf32" else "ieee"  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the output, input and weight, freshly drawn."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype])

        format = torch.channels_last if self.channels_last else torch.contiguous_format
        grad_output, input = (draw(*self.shape).contiguous(memory_format=format) for _ in range(2))
        # As trained layers have it: outputs about as large as inputs.
        weight = draw(self.case.channels, 1, *self.kernel_size) / math.sqrt(math.prod(self.kernel_size))
        return grad_output, input, weight


def tuned_among(kind: Kind, setting: Setting) -> list[str]:
    """Paths that the tuner tries for a setting; none where it is never asked."""
    if max(setting.kernel_size) < _cuda.SMALLEST_KERNEL:
        return []
    shape, kernel_size = _paths._dense(setting.shape, (0, 0, *setting.kernel_size), (1, 1))
    return _cuda.candidates(kind, shape, kernel_size, DTYPES[setting.dtype], setting.channels_last, 0)


def candidates(kind: Kind, setting: Setting) -> list[str]:
    """Every path that can compute a setting: those that the tuner tries and all other cuts of Triton's products."""
    shape, kernel_size = _paths._dense(setting.shape, (0, 0, *setting.kernel_size), (1, 1))
    dtype = DTYPES[setting.dtype]
    if max(setting.kernel_size) < _cuda.SMALLEST_KERNEL:  # PyTorch's own are all there is for these
        paths = _cuda.candidates(kind, shape, kernel_size, dtype, setting.channels_last, 0)
        return [path for path in paths if path in PYTORCH]
    paths, kernels = tuned_among(kind, setting), _cuda._kernels()
    if kernels is not None and setting.dtype != "float32":  # whose products are cut in one way, whatever the name
        others = [name for name in kernels.CONFIGS if name not in paths]
        paths += [name for name in others if _cuda.can_compute(name, shape, kernel_size, dtype, 0)]
    return paths


def compute(kind: Kind, path: str, operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One result by one path."""
    grad_output, input, weight = operands
    if kind == "forward":
        return _operators._convolve_by(path, (input, weight, None), (1, 1))
    return _operators._gradient_by(path, (grad_output, input, weight), KINDS[1:].index(kind), (1, 1))


def compute_as_users_do(kind: Kind, operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One result by whatever path the operator takes; the first time it measures."""
    grad_output, input, weight = operands
    if kind == "forward":
        return depthwise_conv2d(input, weight)
    wanted = [kind == "input_gradient", kind == "weight_gradient"]
    if max(weight.shape[2:]) < _cuda.SMALLEST_KERNEL:  # never reaches our operator
        return compute(kind, "native", operands)
    return _operators._gradients(grad_output, input, weight, (1, 1), "auto", wanted)[wanted.index(True)]


def tolerance(setting: Setting) -> float:
    """Relative error against float64 that a path may have."""
    return TOLERANCES[DTYPES[setting.dtype], "tf32" if setting.dtype == "tf32" else "ieee"]


class Reference:
    """Results in float64 of a setting: of its first and last image, and for weights of some channels."""

    def __init__(self, kind: Kind, operands: tuple[Tensor, Tensor, Tensor]) -> None:
        grad_output, input, weight = operands
        batch, channels = input.shape[:2]
        self.kind = kind
        self.images = sorted({0, batch - 1})
        self.channels = sorted({*range(min(channels, 8)), *range(max(0, channels - 8), channels)})
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        if kind == "weight_gradient":
            maps, grad = (tensor[:, self.channels].double().contiguous() for tensor in (input, grad_output))
            kernel = weight[self.channels].double().requires_grad_()
            with torch.enable_grad():
                output = F.conv2d(maps, kernel, padding=padding, groups=len(self.channels))
                (self.exact,) = torch.autograd.grad(output, kernel, grad)
            return
        maps = (input if kind == "forward" else grad_output)[self.images].double().contiguous()
        kernel = (weight if kind == "forward" else weight.flip(2, 3)).double()
        self.exact = F.conv2d(maps, kernel, padding=padding, groups=channels)

    def error(self, result: Tensor) -> float:
        """Relative L2 error; infinite if a number is not finite."""
        error = float((self._part(result) - self.exact).norm() / self.exact.norm())
        return error if math.isfinite(error) else math.inf

    def disagreement(self, result: Tensor, tolerance: float) -> str:
        """Return in what a result is wrong, in words: as a whole, in one map, in one value."""
        return disagreement(self._part(result), self.exact, tolerance)

    def _part(self, result: Tensor) -> Tensor:
        return (result[self.channels] if self.kind == "weight_gradient" else result[self.images]).double()


def check(
    setting: Setting,
    kinds: tuple[Kind, ...],
    device: torch.device,
    without: set[tuple[str, str]],
    starting: Callable[[Kind, str], None] = lambda kind, path: None,
) -> Iterator[dict[str, Any]]:
    """Let every candidate compute a setting once, and compare with float64.

    Args:
        setting: What to compute.
        kinds: Which results.
        device: Where.
        without: Pairs of result and path to leave out.
        starting: Told what comes next, in case nobody lives to tell.

    Yields:
        ``kind``, ``path``, and ``error`` or ``failed``; of Triton's, registers and spilled values of new kernels.
    """
    with setting.rounding(), torch.no_grad():
        wanted = {kind: [path for path in candidates(kind, setting) if (kind, path) not in without] for kind in kinds}
        if not any(wanted.values()):
            return
        operands = setting.operands(device)
        for kind, paths in wanted.items():
            if not paths:
                continue
            reference = Reference(kind, operands)
            for path in paths:
                starting(kind, path)
                known = _compiled_kernels()
                found: dict[str, Any] = {"kind": kind, "path": path}
                try:
                    result = compute(kind, path, operands)
                    found["error"] = reference.error(result)
                    found["kernels"] = _resources(known)
                    if wrong := reference.disagreement(result, tolerance(setting)):
                        found["failed"] = f"wrong numbers against float64: {wrong}"
                        found["error"] = found["error"] if math.isfinite(found["error"]) else None
                except Exception as error:
                    found["failed"] = explain_failure(error)
                yield found
    free_memory()


def _compiled_kernels() -> dict[int, tuple[str, Any]]:
    """Triton's compiled kernels of this process; where its inside looks different, none."""
    kernels, found = _cuda._kernels(), {}
    for name in ("_convolve_kernel", "_toeplitz_gradient_kernel"):
        try:
            for caches in getattr(kernels, name).device_caches.values():
                for kernel in caches[0].values():
                    found[id(kernel)] = (name.strip("_"), kernel)
        except Exception:  # this is for information only
            continue
    return found


def _resources(known: dict[int, tuple[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": name,
            "registers": getattr(kernel, "n_regs", None),
            "spills": getattr(kernel, "n_spills", None),
            "shared_bytes": getattr(getattr(kernel, "metadata", None), "shared", None),
        }
        for key, (name, kernel) in _compiled_kernels().items()
        if key not in known
    ]


@functools.lru_cache
def toeplitz_flops(setting: Setting, kind: Kind) -> float:
    """Floating point operations of the cheapest block-Toeplitz product that the kernels can be told to make."""
    kernels = _cuda._kernels()
    if kernels is None:
        return math.nan
    shape, (height, width) = _paths._dense(setting.shape, (0, 0, *setting.kernel_size), (1, 1))
    itemsize, clipped = DTYPES[setting.dtype].itemsize, kind != "weight_gradient"
    products = min(
        kernels.choose_tiling(*sizes, kernel, config, itemsize, clipped).products
        for config in kernels.CONFIGS.values()
        for sizes, kernel in ((shape[2:], (height, width)), (shape[:1:-1], (width, height)))
    )
    return 2.0 * shape[0] * shape[1] * products


def limits(setting: Setting, kind: Kind, rates: dict[str, Any]) -> dict[str, float | None]:
    """Least milliseconds by what the card reached in matrix products and copies, of one result."""

    def over(amount: float, rate: object, scale: float) -> float:
        return amount / rate * scale if isinstance(rate, float) and math.isfinite(amount) else math.nan

    # Where float32 may not be rounded, three products of TF32 stand for one.
    products = 3 if setting.dtype == "float32" else 1
    tensor_cores = "tf32" if DTYPES[setting.dtype] == torch.float32 else setting.dtype
    toeplitz = over(products * toeplitz_flops(setting, kind), rates.get(tensor_cores), 1e-9)
    direct = over(setting.case.flops, rates.get("float32"), 1e-9)
    # Two maps are read, or one read and one written; kernels are small beside them.
    memory = over(2 * setting.input_bytes, rates.get("copy_gb_per_second"), 1e-6)
    arithmetic = min((value for value in (toeplitz, direct) if math.isfinite(value)), default=math.nan)
    found = {
        "toeplitz_ms": max(toeplitz, memory),
        "memory_ms": memory,
        "direct_ms": direct,
        "roofline_ms": max(arithmetic, memory),
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def measure(
    setting: Setting,
    watch: Stopwatch,
    rates: dict[str, Any],
    checked: dict[str, dict[str, dict[str, Any]]],
    seconds: float,
) -> dict[str, Any]:
    """Time every candidate of a setting, and the operator as it chooses.

    Args:
        setting: What to compute.
        watch: Times it.
        rates: Of `gpu_device.measure_rates`.
        checked: What `check` found elsewhere, by result and path; what is not in it is checked here.
        seconds: To spend on each result, about.

    Raises:
        DeviceLost: If the device does not work any more.
    """
    results: dict[str, Any] = {}
    with setting.rounding(), torch.no_grad():
        for kind in KINDS:
            try:
                # Where several processes shared the card, memory may have been too small that one alone finds enough.
                found = {
                    path: entry
                    for path, entry in checked.get(kind, {}).items()
                    if "error" in entry or entry["failed"] != OUT_OF_MEMORY
                }
                settled = {(kind, path) for path in found}
                found |= {entry["path"]: entry for entry in check(setting, (kind,), watch.device, settled)}
                results[kind] = _measure_kind(kind, setting, watch, rates, found, seconds)
            except DeviceLost:
                raise
            except Exception as error:
                results[kind] = {"failed": {"all": explain_failure(error)}, "paths": {}}
            free_memory()
    return {
        **asdict(setting.case),
        "dtype": setting.dtype,
        "layout": "channels_last" if setting.channels_last else "contiguous",
        "label": setting.label,
        "results": results,
    }


def _measure_kind(
    kind: Kind,
    setting: Setting,
    watch: Stopwatch,
    rates: dict[str, Any],
    checked: dict[str, dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    operands = setting.operands(watch.device)
    failed = {path: entry["failed"] for path, entry in checked.items() if "failed" in entry}
    paths = [path for path in candidates(kind, setting) if path not in failed]
    runs: dict[str, Callable[[], object]] = {path: functools.partial(compute, kind, path, operands) for path in paths}
    runs["ours"] = functools.partial(compute_as_users_do, kind, operands)
    times, failures = watch.race(runs, seconds, rounds=7 if watch.device.type == "cuda" else 1)
    plan = explain(operands[1], operands[2])
    bounds, flops = limits(setting, kind, rates), setting.case.flops
    entries: dict[str, dict[str, Any]] = {}
    for path, own in times.items():
        entry: dict[str, Any] = own.figures()
        median = entry["device_ms_median"]
        entry["tflops"] = flops / median / 1e9
        roofline = bounds["roofline_ms"]
        entry["share_of_roofline"] = None if roofline is None else roofline / median
        if path != "ours":
            entry |= {name: checked[path][name] for name in ("error", "kernels")}
        entries[path] = entry
    return {
        "useful_gflop": flops / 1e9,
        "toeplitz_gflop": toeplitz_flops(setting, kind) / 1e9,
        **bounds,
        "chosen": getattr(plan, kind),
        "reason": plan.reason,
        "tuned_among": tuned_among(kind, setting),
        "ours": entries.pop("ours", None),
        "paths": entries,
        "failed": {**failed, **failures},
    }


# ---------------------------------------------------------------------------------------------------- which shapes


def _case(group: str, batch: int, channels: int, size: int | tuple[int, int], kernel: int | tuple[int, int]) -> Case:
    height, width = (size, size) if isinstance(size, int) else size
    kernel_height, kernel_width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Case(group, batch, channels, height, width, kernel_height, kernel_width)


REPLKNET = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))
REPLKNET_512 = ((128, 128, 31), (256, 64, 29), (512, 32, 27), (1024, 16, 13))


def stage_settings() -> list[Setting]:
    """Return encoder stages as they are trained, the ones that most is asked about first."""
    first, second, *small = (_case("stages", 64, *stage) for stage in REPLKNET)
    others = [_case("stages", 64, *shape) for shape in ((128, 56, 51), (256, 28, 31), (128, 56, 21), (256, 28, 21))]
    settings = [Setting(case) for case in (first, second, others[0], *small, *others[1:])]
    return settings + [Setting(case, channels_last=True) for case in (first, second)]


def paper_settings() -> list[Setting]:
    """Return the table of the RepLKNet and UniRepLKNet papers, types after each other, the ends of rows first."""
    kernels = (31, 13, 7, 21, 3, 27, 17, 9, 5)
    cases = [_case("paper", 64, 384, size, kernel) for kernel in kernels for size in (32, 16, 64)]
    return [Setting(case, dtype) for dtype in ("bfloat16", "float16", "float32") for case in cases]


def shape_settings() -> list[Setting]:
    """Everything else that is asked about, the types in turn so that a run cut short has some of each."""
    first, second = REPLKNET[:2]
    return [
        *(Setting(_case("types", 64, *stage), dtype) for stage in (first, second) for dtype in ("float16", "float32")),
        Setting(_case("types", 64, *first), "tf32"),
        *(Setting(_case("batch 1", 1, *stage)) for stage in REPLKNET),
        *(Setting(_case("batch 8", 8, *stage)) for stage in REPLKNET),
        *(Setting(_case("crop 512", 8, *stage)) for stage in REPLKNET_512),
        Setting(_case("largest", 64, 96, 56, 51)),
        Setting(_case("largest", 64, 96, 56, 101)),
        Setting(_case("largest", 8, 96, 128, 101)),
        *(Setting(_case("strips", 64, 124, 56, kernel)) for kernel in ((51, 5), (5, 51))),
        *(Setting(_case("strips", 64, 249, 28, kernel)) for kernel in ((49, 5), (5, 49))),
        Setting(_case("crop 512×1024", 2, 128, (128, 256), 31)),
        *(Setting(_case(f"batch {batch}", batch, *first)) for batch in (2, 4)),
        *(Setting(_case("types", 64, *stage), dtype) for stage in REPLKNET[2:] for dtype in ("float16", "float32")),
        *(Setting(_case("types", 64, *stage), "tf32") for stage in REPLKNET[1:]),
        Setting(_case("crop 512", 8, *REPLKNET_512[0]), "float32"),
        Setting(_case("largest", 64, 96, 56, 51), "float32"),
        *(Setting(_case("batch 1", 1, *stage), "float32") for stage in REPLKNET),
        *(
            Setting(_case("types", 64, *stage), dtype, True)
            for dtype in ("float16", "float32")
            for stage in REPLKNET[:2]
        ),
    ]


def pretended_settings(section: str) -> list[Setting]:
    """Return one or two tiny settings for each section."""
    settings = {
        "stages": [Setting(_case("stages", 2, 1, 8, 7))],
        "paper": [Setting(_case("paper", 1, 1, 5, kernel)) for kernel in (3, 7)],
        "shapes": [Setting(_case("strips", 1, 2, (4, 9), (3, 9)), "float16", channels_last=True)],
    }
    return settings[section]
