"""From a model to files: folded, traced, written, run by the runtime that will run them, compared, timed."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.export import Dim, ExportedProgram

import lk_backbones
from lk_backbones._files import UNFINISHED
from lk_backbones.analysis.erf import observed, placement
from lk_backbones.analysis.memory import require_memory_to_run
from lk_backbones.analysis.timing import interleave
from lk_backbones.export.example import example
from lk_backbones.export.formats import FORMATS, Format, Run, find_format, quantize_onnx
from lk_backbones.export.graph import SIZE_MULTIPLE, Deployment, deployment, foldable_copy, labels_of
from lk_backbones.tasks.base import BaseTask

__all__ = ["CheckedFile", "Export", "export_model", "require_possible"]

#: Largest difference that a float32 file may have from the model, as a share of the largest value, and the least share
#: of equal labels where labels come out.
_TOLERANCE, _LEAST_AGREEMENT = 1e-3, 0.999
#: Model, folded copy, program, file in memory, runtime.
_COPIES = 6


@dataclass(frozen=True)
class CheckedFile:
    """A file that was run and compared.

    Attributes:
        format: Its format; of a quantised file with "int8" behind it.
        file: Its name.
        megabytes: Its size, that of weights beside it included.
        difference: Largest difference from the model, as a share of the model's largest value; of label maps ``None``.
        agreement: Share of pixels, or pictures, with the same best class; ``None`` where there are no classes.
        median_ms: Median time for one picture.
        fastest_ms: Shortest time.
        speed: Times as fast as the folded model in PyTorch in the same run, by the medians.
    """

    format: str
    file: str
    megabytes: float
    difference: float | None
    agreement: float | None
    median_ms: float
    fastest_ms: float
    speed: float


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: Where.
        metadata: What ``metadata.json`` says of the model, its input and its outputs.
        files: Each file, and how it compares.
        eager_ms: Median time of the folded model in PyTorch for one picture.
        notes: What the user should know.
    """

    folder: Path
    metadata: dict[str, Any]
    files: list[CheckedFile]
    eager_ms: float
    notes: list[str]


def export_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    images: Sequence[torch.Tensor],
    formats: Sequence[str] = ("onnx",),
    input_size: tuple[int, int] = (512, 512),
    *,
    features: bool = False,
    preprocessing: bool = False,
    fixed_size: bool = False,
    int8: bool = False,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    description: dict[str, Any] | None = None,
    seconds: float = 5.0,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Export:
    """Write a model, folded, in formats that run without this package, and prove each file on pictures.

    Nothing is in the folder before every file has been loaded by its runtime and has given what the model gives.

    Args:
        model: A task, an smp model, or a model of timm's or torchvision's. It is not changed.
        folder: Where to write.
        images: Pictures ``(C, H, W)`` float32 in [0, 1], of any sizes, to compare on and to calibrate with.
        formats: Names out of `FORMATS`.
        input_size: ``(height, width)`` of the images that it is traced and timed with.
        features: Write the encoder, whose outputs are its feature maps.
        preprocessing: Put into the graph what comes before (8-bit pictures of any size are resized and normalised) and
            after (label map or probabilities).
        fixed_size: Let the files take images of ``input_size`` only.
        int8: Write an ONNX file quantised to 8 bits too, and measure what that loses.
        mean: Of every channel in [0, 1]; a task knows its own.
        std: Likewise.
        description: What else ``metadata.json`` shall say.
        seconds: For the timing.
        overwrite: Whether files of an earlier export may be replaced.
        progress: Told what is about to be done.

    Raises:
        ValueError: If a format is unknown or lacks something, the model cannot be exported, memory is too small, or a
            file does not give what the model gives.
        FileExistsError: If something is there that would be replaced.
    """
    target, chosen = Path(folder), require_possible(folder, formats, int8, overwrite)
    if not images:
        raise ValueError("pictures are needed to compare on")
    if placement(model)[0].type != "cpu":
        raise ValueError(
            f"the model is on {placement(model)[0]}: files are written and compared on the CPU, move it there"
        )
    with observed(model):
        channels = len(images[0])
        if preprocessing and channels != 3:
            raise ValueError(f"preprocessing is for RGB pictures, and the model takes images of {channels} channels")
        original = deployment(
            model,
            mean,
            std,
            features=features,
            size=input_size if preprocessing else None,
            pad=fixed_size or preprocessing,
            channels=channels,
            probe=input_size if fixed_size or preprocessing else _smallest_probe(input_size),
        )
        require_memory_to_run(model, _plain_run(original, channels), input_size, 2, _COPIES)
        if not preprocessing and not fixed_size and any(side % original.multiple for side in input_size):
            raise ValueError(
                f"input size {input_size[0]} × {input_size[1]}: a graph for changing sizes takes multiples of "
                f"{original.multiple}. Choose such a size, or fix the size, or put the preprocessing into the graph"
            )
        folded = foldable_copy(original)
        program, changing, notes = _traced(folded, _batch([images[0]] * 2, original, input_size), fixed_size, progress)
        cases = [_batch(images[:2], original, input_size)]
        if len(images) > 2:
            cases += [_batch([image], original, input_size) for image in images[2:]]
        if "height" in changing:  # another size than the one that it was traced with
            other = (input_size[0] + original.multiple, input_size[1] + 2 * original.multiple)
            cases.append(_batch(images[:1], original, other))
        if "batch" not in changing:
            cases = [_batch([image] * 2, original, input_size) for image in images]
        with torch.no_grad():
            expected = [list(original(case)) for case in cases]
        if not all(bool(torch.isfinite(tensor).all()) for outputs in expected for tensor in outputs):
            raise ValueError(
                "the model itself gives infinite values or such that are no numbers: there is nothing to compare"
            )
        outputs = original.output_names(len(expected[0]))
        metadata = _metadata(model, original, input_size, changing, outputs) | (description or {})
        if not metadata["class_names"] and original.kind in ("segmentation", "classification"):
            with torch.no_grad():
                (scores,) = folded.scores(cases[0])
            number = scores.shape[1]
            if number == 1 and original.kind == "segmentation":
                number = 2  # one logit tells two classes apart
            metadata["class_names"] = [f"class_{i}" for i in range(number)]
        if isinstance(model, BaseTask) and model.hparams.get("inference") == "slide":
            notes.append("the task segments in sliding windows: the files hold the network that sees one window")
        with _staging(target) as staging:
            runs: dict[str, tuple[str, Run]] = {}
            for known in chosen:
                progress(f"writing {known.name}")
                name = f"model{known.suffix}"
                try:
                    known.write(program, staging / name, metadata, outputs)
                except Exception as error:  # whatever a compiler or exporter raises
                    raise ValueError(f"{known.name} could not be written: {_first_line(error)}") from error
                progress(f"running {name} with {known.runtime}")
                runs[known.name] = (name, _loaded(known, staging / name))
            has_classes = original.kind in ("segmentation", "classification")
            results = {name: _compare(run, cases, expected, file, has_classes) for name, (file, run) in runs.items()}
            for name, (difference, agreement) in results.items():
                _require_equal(runs[name][0], difference, agreement)
            if int8:
                progress("quantising")
                onnx = find_format("onnx")
                calibration = [_batch([image], original, input_size) for image in images]
                try:
                    quantize_onnx(staging / "model.onnx", staging / "model.int8.onnx", calibration, metadata)
                except Exception as error:  # whatever a quantiser raises
                    raise ValueError(f"onnxruntime does not quantise the model: {_first_line(error)}") from error
                runs["onnx int8"] = ("model.int8.onnx", _loaded(onnx, staging / "model.int8.onnx"))
                results["onnx int8"] = _compare(runs["onnx int8"][1], cases, expected, "model.int8.onnx", has_classes)
            progress("timing")
            one = cases[-1] if "batch" not in changing else _batch(images[:1], original, input_size)
            timings = interleave(_contestants(folded, runs, one), seconds, patience=5000)
            eager = timings["eager"].median
            files = [
                CheckedFile(
                    format=name,
                    file=file,
                    megabytes=sum(path.stat().st_size for path in staging.glob(f"{file}*")) / 1e6,
                    difference=results[name][0],
                    agreement=results[name][1],
                    median_ms=timings[name].median,
                    fastest_ms=timings[name].best,
                    speed=eager / timings[name].median,
                )
                for name, (file, _) in runs.items()
            ]
            for checked in files if channels == 3 else []:  # a picture has no other number
                runtime = find_format(checked.format.split()[0]).runtime
                script = _script(checked.format)
                (staging / script).write_text(example(checked.file, script, runtime, metadata), encoding="utf-8")
            compared = {"eager_ms": eager, "pictures": len(images), "files": [asdict(checked) for checked in files]}
            text = json.dumps(metadata | {"compared": compared}, indent=2)
            (staging / "metadata.json").write_text(f"{text}\n", encoding="utf-8")
            runs.clear()  # Windows moves no open files
            _hand_over(staging, target, overwrite)
        return Export(target, metadata, files, eager, notes)


def require_possible(
    folder: str | os.PathLike[str], formats: Sequence[str], int8: bool = False, overwrite: bool = False
) -> list[Format]:
    """Refuse an export that cannot come to its end, before a model is built or fetched for it.

    Args:
        folder: As for `export_model`.
        formats: Likewise.
        int8: Likewise.
        overwrite: Likewise.

    Returns:
        The formats.

    Raises:
        ValueError: If a format is unknown, or something that it needs is not installed.
        FileExistsError: If something is there that would be replaced.
    """
    chosen = [find_format(name) for name in dict.fromkeys(formats)]
    if int8 and not any(known.name == "onnx" for known in chosen):
        raise ValueError("int8 quantises the ONNX file: add the format onnx")
    _require_new(Path(folder), overwrite)
    return chosen


# ---- tracing ----


def _traced(
    folded: Deployment, image: torch.Tensor, fixed_size: bool, progress: Callable[[str], None]
) -> tuple[ExportedProgram, list[str], list[str]]:
    """Trace a network for as much change of its input as it allows."""
    batch = Dim("batch")
    if folded.size is not None:
        sizes: dict[int, Any] = {0: batch, 1: Dim("height"), 2: Dim("width")}
    else:
        sizes = {0: batch, 2: folded.multiple * Dim("rows"), 3: folded.multiple * Dim("columns")}
    attempts = [(["batch", "height", "width"], sizes), (["batch"], {0: batch}), ([], {})]
    if fixed_size and folded.size is None:
        attempts = attempts[1:]
    reason = ""
    for changing, dimensions in attempts:
        progress(f"tracing, for any {', '.join(changing) or 'image of this size, one batch'}")
        try:
            program = torch.export.export(folded, (image,), dynamic_shapes={"image": dimensions})
        except Exception as error:  # of every kind, from everything that a model may call
            reason = reason or _first_line(error)
            continue
        notes = []
        if reason:
            what = f"batches of any size, images of {_size_text(image, folded)}" if changing else "batches of 2"
            notes.append(f"the files take {what} only, as the network cannot be traced otherwise: {reason}")
        return program, changing, notes
    raise ValueError(f"torch.export cannot trace {type(folded.network).__name__}: {reason}")


def _size_text(image: torch.Tensor, deployed: Deployment) -> str:
    height, width = image.shape[2:] if deployed.size is None else image.shape[1:3]
    return f"{height} × {width}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _smallest_probe(input_size: tuple[int, int]) -> tuple[int, int]:
    sides = [max(min(side // SIZE_MULTIPLE * SIZE_MULTIPLE, 4 * SIZE_MULTIPLE), SIZE_MULTIPLE) for side in input_size]
    return sides[0], sides[1]


# ---- comparing ----


def _batch(images: Sequence[torch.Tensor], deployed: Deployment, size: tuple[int, int]) -> torch.Tensor:
    """Make of pictures in [0, 1] what a graph takes."""
    resized = [
        F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)
        if tuple(image.shape[1:]) != tuple(size)
        else image[None]
        for image in images
    ]
    batch = torch.cat(resized).clamp(0, 1)
    if deployed.size is not None:
        return (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return (batch - deployed.mean) / deployed.std


def _compare(
    run: Run, cases: Sequence[torch.Tensor], expected: Sequence[Sequence[torch.Tensor]], file: str, has_classes: bool
) -> tuple[float | None, float | None]:
    """Return the largest difference as a share of the largest value, and the share of equal best classes."""
    differences, same, total = [], 0, 0
    for case, right in zip(cases, expected, strict=True):
        try:
            found = run(case)
        except Exception as error:  # whatever a runtime raises
            shape = tuple(case.shape)
            raise ValueError(f"{file} does not run on a batch {shape}: {_first_line(error)}") from error
        for ours, theirs in zip(right, found, strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(f"{file} gives {tuple(theirs.shape)} where the model gives {tuple(ours.shape)}")
            if ours.is_floating_point():
                largest = float((ours - theirs.float()).abs().max())
                differences.append(largest / max(float(ours.abs().max()), 1e-12) if largest == largest else math.inf)
        best, other = (out if not out.is_floating_point() else labels_of(out) for out in (right[0], found[0]))
        same, total = same + int((best == other).sum()), total + best.numel()
    return max(differences, default=None), same / total if has_classes else None


def _require_equal(file: str, difference: float | None, agreement: float | None) -> None:
    if difference is None and agreement is not None and agreement < _LEAST_AGREEMENT:
        raise ValueError(f"{file}: only {agreement:.2%} of its labels are the model's; nothing was written")
    if difference is not None and not difference <= _TOLERANCE:
        raise ValueError(f"{file} differs from the model by {difference:.2g} of its largest value; nothing was written")


def _loaded(known: Format, path: Path) -> Run:
    try:
        return known.load(path)
    except Exception as error:  # whatever a runtime raises
        raise ValueError(f"{known.runtime} does not load {path.name}: {_first_line(error)}") from error


def _contestants(
    folded: Deployment, runs: dict[str, tuple[str, Run]], image: torch.Tensor
) -> dict[str, Callable[[], object]]:
    def eager() -> object:
        with torch.inference_mode():
            return folded(image)

    return {"eager": eager} | {name: (lambda run=run: run(image)) for name, (_, run) in runs.items()}


def _plain_run(deployed: Deployment, channels: int) -> Callable[[tuple[int, int]], object]:
    def run(size: tuple[int, int]) -> object:
        with torch.inference_mode():
            return deployed.scores(torch.zeros(1, channels, *size), normalized=True)

    return run


# ---- what is told ----


def _metadata(
    model: nn.Module,
    deployed: Deployment,
    input_size: tuple[int, int],
    changing: list[str],
    outputs: list[str],
) -> dict[str, Any]:
    names = list(model.class_names) if isinstance(model, BaseTask) else []
    plain = deployed.size is None
    return {
        "model": type(model).__name__,
        "kind": deployed.kind,
        "input": "image",
        "layout": f"float32 (batch, {deployed.mean.shape[1]}, height, width), RGB in [0, 1], less mean, over std"
        if plain
        else "uint8 (batch, height, width, 3), RGB",
        "input_size": list(input_size),
        "changing": changing,
        "size_multiple": deployed.multiple if plain and "height" in changing else 1,
        "preprocessing": not plain,
        "mean": deployed.mean.flatten().tolist(),
        "std": deployed.std.flatten().tolist(),
        "outputs": outputs,
        "class_names": names,
        "written_by": f"lk_backbones {lk_backbones.__version__}, torch {torch.__version__}",
    }


# ---- files ----


def _script(name: str) -> str:
    return f"run_{name.replace('-', '_').replace(' ', '_')}.py"


def _require_new(target: Path, overwrite: bool) -> None:
    """Refuse a folder with anything that an export could have written: it would be replaced, or stand beside files
    that it does not belong to."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: name a folder")
    there = [target / name for name in _names() if (target / name).exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{more} exists: choose another folder with --to, or add --overwrite")


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Make a folder beside the target's place, which is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / UNFINISHED.replace("*", secrets.token_hex(8))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hand_over(staging: Path, target: Path, overwrite: bool) -> None:
    """Give the files their names; what else is in the folder stays."""
    target.mkdir(exist_ok=True)
    # the description is last: then all are there
    files = sorted(staging.iterdir(), key=lambda path: path.name == "metadata.json")
    _require_new(target, overwrite)  # they may have come up meanwhile
    written = {file.name for file in files}
    for name in _names():  # of an earlier export, perhaps of another model
        if name not in written:
            (target / name).unlink(missing_ok=True)
    for file in files:
        file.replace(target / file.name)


def _names() -> list[str]:
    """Return the names that an export can give to files, of every format."""
    models = [f"model{known.suffix}" for known in FORMATS.values()]
    scripts = [_script(name) for name in (*FORMATS, "onnx int8")]
    return ["metadata.json", *models, "model.int8.onnx", "model.onnx.data", *scripts]
