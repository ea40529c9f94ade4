"""The formats: how each is written, and run by the runtime that will run it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from lk_backbones.weights.errors import nearest

__all__ = ["FORMATS", "Format", "Run", "find_format", "quantize_onnx"]

#: Runs a file: images to outputs.
Run = Callable[[torch.Tensor], list[torch.Tensor]]

#: A file of protobuf holds 2 GiB; what is larger has its weights beside it.
_LARGEST_FILE = 1_800_000_000


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        name: As the command calls it.
        suffix: Of its files.
        runtime: What runs them.
        write: Writes a program and what is to be known of it, with names of the outputs.
        load: Opens a file with its runtime.
        missing: Says what lacks on this machine, or nothing.
    """

    name: str
    suffix: str
    runtime: str
    write: Callable[[ExportedProgram, Path, Mapping[str, Any], Sequence[str]], None]
    load: Callable[[Path], Run]
    missing: Callable[[], str]


def find_format(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ValueError: If there is none of this name, or something that it needs is not installed.
    """
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}{nearest(name, FORMATS)}; there are {', '.join(FORMATS)}")
    if missing := FORMATS[name].missing():
        raise ValueError(f"format {name} needs {missing}")
    return FORMATS[name]


# ---- ONNX ----


def _missing_for_onnx() -> str:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    return f"{', '.join(missing)}: pip install 'lk-backbones[export]'" if missing else ""


def _write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, Any], outputs: Sequence[str]) -> None:
    import onnx

    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    with _quiet():
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            verbose=False,
            external_data=size > _LARGEST_FILE,
            input_names=["image"],
            output_names=list(outputs),
        )
    model = onnx.load(path, load_external_data=False)
    _name_axes(model)
    onnx.helper.set_model_props(model, _as_text(metadata))
    onnx.save(model, path)


def _name_axes(model: Any) -> None:
    """Call the changing axes by names, rather than by the numbers that the exporter gave them."""
    (image,) = model.graph.input
    letters = ("batch", "channels", "height", "width") if image.type.tensor_type.elem_type == 1 else _PICTURE_AXES
    names: dict[str, str] = {}
    for dimension, name in zip(image.type.tensor_type.shape.dim, letters, strict=True):
        for symbol in re.findall(r"s\d+", dimension.dim_param):
            names[symbol] = name if dimension.dim_param == symbol else name[0]  # 32*h is a height
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(r"s\d+", lambda found: names.get(found[0], found[0]), dimension.dim_param)


_PICTURE_AXES = ("batch", "height", "width", "channels")


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(np.asarray(output)) for output in session.run(None, {"image": image.numpy()})]

    return run


def quantize_onnx(path: Path, to: Path, images: Iterable[torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Quantise convolutions and matrix products of an ONNX file to 8 bits, calibrated on images.

    Weights are quantised per channel, activations per tensor, as QDQ pairs (onnxruntime's static quantisation).

    Args:
        path: The file.
        to: The quantised file.
        images: Batches as the file takes them.
        metadata: What is to be known of it.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter(images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {"image": batch.numpy()}

    prepared = to.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared, load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        # a product of two maps, such as an average over a grid, has another range at every size
        unweighted = [
            node.name for node in graph.node if node.op_type == "MatMul" and not weights.intersection(node.input)
        ]
        quantization.quantize_static(
            prepared,
            to,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=unweighted,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    for file in prepared.parent.glob(f"{prepared.name}*"):
        file.unlink()
    model = onnx.load(to, load_external_data=False)
    onnx.helper.set_model_props(model, _as_text(metadata))
    onnx.save(model, to)


# ---- PyTorch's own ----


def _write_program(program: ExportedProgram, path: Path, metadata: Mapping[str, Any], outputs: Sequence[str]) -> None:
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})


def _load_program(path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(module(image))

    return run


def _missing_for_aotinductor() -> str:
    wanted = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([wanted] if wanted else ["g++", "clang++"])):
        return ""
    which = f"CXX names {wanted}, which is not there" if wanted else "neither g++ nor clang++ is there"
    return f"a C++ compiler, and {which}: install one, or name it with CXX"


def _write_package(program: ExportedProgram, path: Path, metadata: Mapping[str, Any], outputs: Sequence[str]) -> None:
    from lk_backbones._private.inductor import aoti_compile_and_package

    settings = {"aot_inductor.metadata": _as_text(metadata)}
    with _quiet():
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def _load_package(path: Path) -> Run:
    from lk_backbones._private.inductor import aoti_load_package

    run = aoti_load_package(str(path))

    def call(image: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(run(image))

    return call


def _as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what exporters and quantisers say of their own steps: every file is compared afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS = {
    known.name: known
    for known in (
        Format("onnx", ".onnx", "onnxruntime", _write_onnx, _load_onnx, _missing_for_onnx),
        Format("torch-export", ".pt2", "torch.export", _write_program, _load_program, lambda: ""),
        Format(
            "aotinductor", ".aotinductor.pt2", "AOTInductor", _write_package, _load_package, _missing_for_aotinductor
        ),
    )
}
