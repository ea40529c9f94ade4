"""What is written is what the model computes, and nothing is written that is not."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from lk_backbones.cli import main
from lk_backbones.export import FORMATS, build, export_model, formats
from lk_backbones.export.graph import _GridAverage, deployment
from lk_backbones.layers import ReparamDepthwiseConv2d
from lk_backbones.tasks import DetectionTask, SegmentationTask
from tests.conftest import assert_golden, randomize_norms

onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs the [export] extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX needs the [export] extra")
pytest.importorskip("onnxscript", reason="exporting to ONNX needs the [export] extra")

SIZE = (64, 96)


class Net(nn.Module):
    """A segmentation network with what makes an export go wrong: parallel branches, pooling to a grid, resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.large = ReparamDepthwiseConv2d(8, [(7, 1), (3, 1)])
        self.pool = nn.AdaptiveAvgPool2d((3, 2))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.large(self.stem(image))
        pooled = nn.functional.interpolate(self.pool(x), x.shape[2:], mode="bilinear", align_corners=False)
        scores = self.head(torch.cat([x, pooled], 1))
        return nn.functional.interpolate(scores, image.shape[2:], mode="bilinear", align_corners=False)


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(Net()).eval()


def pictures(number: int = 3, size: tuple[int, int] = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(number, 3, 8, 8, generator=generator)
    return list(nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1))


def session(file: Path) -> Any:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("plain") / "deep" / "exported"
    names = ["onnx", "torch-export"]
    return folder, export_model(net(), folder, pictures(), names, SIZE, int8=True, seconds=0.01)


def test_every_file_of_any_size_and_batch(exported: tuple[Path, Any]) -> None:
    folder, export = exported
    assert export.metadata["changing"] == ["batch", "height", "width"]
    assert export.notes == []
    images = (torch.stack(pictures(3, (128, 32))) - 0.45) / 0.23
    with torch.no_grad():
        expected = net()(images)
    (by_onnx,) = session(folder / "model.onnx").run(["logits"], {"image": images.numpy()})
    assert_golden(torch.from_numpy(by_onnx), expected, 1e-5)
    (by_torch,) = torch.export.load(folder / "model.pt2").module()(images)
    assert_golden(by_torch, expected, 1e-5)
    (quantised,) = session(folder / "model.int8.onnx").run(None, {"image": images.numpy()})
    assert 0 < np.abs(quantised - expected.numpy()).max() < 0.1 * expected.abs().max()


def test_what_is_told_of_the_files(exported: tuple[Path, Any]) -> None:
    folder, export = exported
    about = json.loads((folder / "metadata.json").read_text())
    assert about["kind"] == "segmentation"
    assert about["class_names"] == [f"class_{i}" for i in range(5)]
    assert [file["format"] for file in about["compared"]["files"]] == ["onnx", "torch-export", "onnx int8"]
    assert [file.difference < 1e-5 for file in export.files] == [True, True, False]
    assert export.files[2].agreement < export.files[0].agreement == 1
    for file in export.files:
        assert file.speed == pytest.approx(export.eager_ms / file.median_ms)
        assert file.megabytes == pytest.approx((folder / file.file).stat().st_size / 1e6)
    model = onnx.load(folder / "model.onnx")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["class_names"]) == about["class_names"]
    shape = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, "32*h", "32*w"]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 3  # the branches are one convolution, without norms
    extra = {"metadata.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"])["mean"] == about["mean"]


@pytest.mark.parametrize("script", ["run_onnx.py", "run_onnx_int8.py", "run_torch_export.py"])
def test_the_program_beside_a_file(
    script: str, exported: tuple[Path, Any], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder, _ = exported
    pixels = (pictures(1)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "a.png")])
    runpy.run_path(str(folder / script))
    printed = capsys.readouterr().out
    about = json.loads((folder / "metadata.json").read_text())
    image = (torch.from_numpy(pixels) / 255 - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    with torch.no_grad():
        labels = net()(image.permute(2, 0, 1)[None]).argmax(1)
    best = int(labels.flatten().mode().values)
    share = float((labels == best).float().mean())
    told = float(printed.split(f"class_{best}: ")[1].split("%")[0]) / 100
    assert told == pytest.approx(share, abs=0.05 if "int8" in script else 0.002)


def test_preprocessing_in_the_graph(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    task = SegmentationTask("fpn", "resnet18", num_classes=4, class_names=["sky", "road", "tree", "car"]).eval()
    task.model = net()
    task.hparams.update(mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7], inference="slide")
    export = export_model(task, tmp_path / "a", pictures(), ["onnx"], (48, 80), preprocessing=True, seconds=0.01)
    assert export.metadata["outputs"] == ["label_map"]
    assert export.metadata["mean"] == pytest.approx([0.2, 0.3, 0.4])
    assert any("sliding windows" in note for note in export.notes)
    picture = (pictures(2, (70, 50))[1].permute(1, 2, 0) * 255).round().to(torch.uint8)
    (labels,) = session(tmp_path / "a" / "model.onnx").run(None, {"image": picture[None].numpy()})
    assert labels.dtype == np.uint8
    assert labels.shape == (1, 70, 50)
    small = nn.functional.interpolate(picture.permute(2, 0, 1)[None] / 255, (48, 80), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(task.hparams[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    # 48 × 80 is padded to 64 × 96, of which the network's stride makes whole maps
    padded = nn.functional.pad((small - mean) / std, (0, 16, 0, 16))
    with torch.no_grad():
        scores = net()(padded)[:, :, :48, :80]
    expected = nn.functional.interpolate(scores, (70, 50), mode="bilinear").argmax(1)
    assert (torch.from_numpy(labels) == expected).float().mean() > 0.999


def test_features_of_an_encoder_by_the_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    name = "timm:test_resnet"
    main(
        [
            "export",
            name,
            "--features",
            "--format",
            "torch-export",
            "--input-size",
            "64",
            "--num",
            "1",
            "--seconds",
            "0.01",
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 drawn scene, 64 × 64, any batch, height, width" in printed
    about = json.loads(Path("exported/metadata.json").read_text())
    assert about["outputs"] == [f"level_{i}" for i in range(5)]
    assert about["compared_on"] == "1 drawn scene"
    torch.manual_seed(0)
    images = torch.randn(1, 3, 96, 64)
    model = timm.create_model("test_resnet").eval()
    found = torch.export.load("exported/model.pt2").module()
    model.load_state_dict(
        {key.removeprefix("network.trunk."): value for key, value in found.state_dict().items()}, strict=False
    )
    with torch.no_grad():
        for ours, theirs in zip(
            found(images), model.forward_intermediates(images, intermediates_only=True), strict=True
        ):
            assert_golden(ours, theirs, 1e-5)
    with pytest.raises(SystemExit):
        main(["export", name, "--format", "torch-export"])
    assert "exported/metadata.json and 2 more exists" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 6), (16, 23)])
def test_averages_of_a_grid_are_those_of_pytorch(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width)
    assert_golden(_GridAverage(6, 3)(x), nn.AdaptiveAvgPool2d((6, 3))(x), 1e-5)


def test_a_network_of_one_size(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 64 * 64, 4)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.linear(image.flatten(1))

    model = Fixed().train()
    export = export_model(model, tmp_path / "a", pictures(2), ["torch-export"], (64, 64), fixed_size=True, seconds=0.01)
    assert export.metadata["changing"] == ["batch"]
    assert export.metadata["outputs"] == ["logits"]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    # another export takes the place of this one, with everything that belonged to it; what else is there stays
    (tmp_path / "a" / "model.int8.onnx").touch()
    (tmp_path / "a" / "notes.txt").touch()
    options: dict[str, Any] = {"fixed_size": True, "seconds": 0.01, "overwrite": True}
    export_model(Fixed(), tmp_path / "a", pictures(2), ["torch-export"], (64, 64), **options)
    names = ["metadata.json", "model.pt2", "notes.txt", "run_torch_export.py"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names


def test_nothing_of_the_users_is_deleted_unasked(tmp_path: Path) -> None:
    """A file of another format, which this export would not write, but which would stand beside its description."""
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.onnx exists: choose another folder"):
        export_model(net(), tmp_path, pictures(), ["torch-export"], SIZE, fixed_size=True, seconds=0.01)
    assert (tmp_path / "model.onnx").read_text() == "mine"


@pytest.mark.parametrize("preprocessing", [False, True])
def test_one_logit_tells_two_classes_apart(preprocessing: bool, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """As of ``smp.Unet(classes=1)``: the best of one class is always that one."""
    model = net()
    model.head = nn.Conv2d(16, 1, 1)
    with torch.no_grad():
        model.head.bias -= model(torch.stack(pictures())).median()
    options = {"preprocessing": preprocessing, "fixed_size": not preprocessing, "seconds": 0.01}
    export = export_model(
        model, tmp_path / "a", pictures(), ["torch-export"], SIZE, mean=[0, 0, 0], std=[1, 1, 1], **options
    )
    assert export.metadata["class_names"] == ["class_0", "class_1"]
    assert export.files[0].agreement > 0.999
    pixels = (pictures(1)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "a.png")])
    runpy.run_path(str(tmp_path / "a" / "run_torch_export.py"))
    printed = capsys.readouterr().out
    with torch.no_grad():
        share = float((model(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255) > 0).float().mean())
    assert 0.05 < share < 0.95
    assert float(printed.split("class_1: ")[1].split("%")[0]) / 100 == pytest.approx(share, abs=0.002)


def test_a_file_that_gives_something_else_is_not_handed_over(tmp_path: Path, monkeypatch: Any) -> None:
    def write(program: Any, path: Path, metadata: Any, outputs: Any) -> None:
        with torch.no_grad():
            program.state_dict["network.head.bias"] += 0.01
        torch.export.save(program, path)

    wrong = formats.Format("wrong", ".pt2", "torch.export", write, FORMATS["torch-export"].load, lambda: "")
    monkeypatch.setitem(FORMATS, "wrong", wrong)
    with pytest.raises(ValueError, match=r"model\.pt2 differs from the model by .*nothing was written"):
        export_model(net(), tmp_path / "a", pictures(), ["wrong"], SIZE, fixed_size=True, seconds=0.01)
    assert list(tmp_path.iterdir()) == []


def test_what_export_refuses(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def error(names: list[str], model: nn.Module | None = None, size: tuple[int, int] = SIZE, **options: Any) -> str:
        with pytest.raises((ValueError, OSError)) as refused:
            export_model(model or net(), tmp_path / "a", pictures(), names, size, **options)
        return str(refused.value)

    assert "there is no format 'onx'; did you mean 'onnx'" in error(["onx"])
    assert "int8 quantises the ONNX file" in error(["torch-export"], int8=True)
    assert "multiples of 32" in error(["onnx"], size=(50, 64))
    detector = DetectionTask("fcos", "resnet18", num_classes=2, min_size=64, max_size=64)
    assert "is a detector. How many boxes it finds depends on the picture" in error(["onnx"], detector)
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else True)
    assert "format onnx needs onnxscript: pip install 'lk-backbones[export]'" in error(["onnx"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler, and CXX names no-such-compiler, which is not there" in error(["aotinductor"])
    monkeypatch.setattr("lk_backbones.analysis.memory.available_memory", lambda device: 10**5)
    assert "images of 64 × 96 need about 0.0 GiB for Net" in error(["torch-export"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").touch()
    assert "a is a file: name a folder" in error(["torch-export"])


def test_aotinductor_is_written_with_what_is_known(tmp_path: Path, monkeypatch: Any) -> None:
    """Compiling takes long; what is handed to the compiler is looked at, and that what fails is said."""
    given: dict[str, Any] = {}

    def compile(program: Any, package_path: str, inductor_configs: dict[str, Any]) -> None:
        given.update(inductor_configs)
        raise RuntimeError("g++: fatal error\nmore")

    monkeypatch.setattr(formats, "_missing_for_aotinductor", lambda: "")
    monkeypatch.setattr("lk_backbones._private.inductor.aoti_compile_and_package", compile)
    with pytest.raises(ValueError, match=r"aotinductor could not be written: RuntimeError: g\+\+: fatal error$"):
        export_model(net(), tmp_path / "a", pictures(), ["aotinductor"], SIZE, fixed_size=True, seconds=0.01)
    assert json.loads(given["aot_inductor.metadata"]["outputs"]) == ["logits"]
    assert list(tmp_path.iterdir()) == []


def test_the_parts_of_a_deployment_are_the_models_own() -> None:
    model = net()
    parts = deployment(model, [0.5], [0.5])
    assert parts.network is model
    assert parts.kind == "segmentation"
    assert build._first_line(ValueError("\n a \n b")) == "ValueError: a"
