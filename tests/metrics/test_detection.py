"""COCO metrics from the validation loop, against pycocotools on the files that it writes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lk_backbones.data import CocoDataModule
from lk_backbones.metrics import detection as detection_metrics
from lk_backbones.metrics.detection import METRIC_NAMES, DetectionMetrics
from lk_backbones.metrics.masks import decode_masks, encode_masks
from lk_backbones.tasks import CocoResults

from ..blocks import trainer
from ..data.conftest import COCO_MINI, CocoMaker
from ..oracle import SILENT, oracle_task


def made(folder: Path) -> CocoDataModule:
    """Pictures with two more objects each, an odd number of them, to be shared unevenly."""
    maker = CocoMaker(folder / "coco")
    content = maker.splits["val2017"]
    content["images"] += [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 80} for i in range(14, 19)]
    for i in range(10):
        x, y = 4 * (i % 5), 3 * (i % 5)
        corners = [x, y, x + 40, y, x + 40, y + 30, x, y + 30]
        box = [x, y, 40, 30]
        content["annotations"].append(maker.annotation(60 + i, 14 + i // 2, (3, 7)[i % 2], box, [corners]))
    return CocoDataModule(str(maker.write()), num_workers=0)


@pytest.fixture(params=["mini", "made"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> CocoDataModule:
    """Real pictures with crowds and an empty one, and a made-up set that is always there."""
    if request.param == "made":
        return made(tmp_path)
    if not COCO_MINI.is_dir():
        pytest.skip("needs the COCO pictures, which are not shipped")
    return CocoDataModule(str(COCO_MINI), num_workers=0)


def official(annotations: Path, results: Path, kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        truth.dataset.setdefault("info", {})  # which older releases copy without asking
        evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_validation_gives_the_numbers_of_pycocotools_on_the_written_file(
    data: CocoDataModule, backend: str, tmp_path: Path
) -> None:
    task = oracle_task(data, per_class_ap=True)
    task.val_metrics = DetectionMetrics(masks=True, per_class=True, backend=backend)
    validator = trainer(tmp_path, callbacks=[CocoResults(str(tmp_path))])
    validator.validate(task, datamodule=data, verbose=False)
    logged = {key: value.item() for key, value in validator.callback_metrics.items()}
    annotations = data.root / "annotations" / "instances_val2017.json"
    for kind, name, iou_type in (("box", "predictions", "bbox"), ("mask", "predictions_masks", "segm")):
        stats = official(annotations, tmp_path / "val" / f"{name}.json", iou_type)
        assert 0.05 < stats[0] < 0.95
        for key, expected in zip(METRIC_NAMES, stats, strict=True):
            actual = logged[f"val/{kind}_{key}"]
            if expected == -1:
                assert math.isnan(actual)
            else:
                assert actual == pytest.approx(expected, abs=1e-6), (kind, key)
        per_class = [value for key, value in logged.items() if key.startswith(f"val/{kind}_ap/")]
        assert len(per_class) == data.num_classes
        # The mean over the classes that occur is the AP.
        assert torch.tensor(per_class).nanmean().item() == pytest.approx(stats[0], abs=1e-6)


def test_written_results_name_the_data_sets_own_ids(tmp_path: Path) -> None:
    data = made(tmp_path)
    callback = CocoResults(str(tmp_path / "out"))
    trainer(tmp_path, callbacks=[callback]).validate(oracle_task(data), datamodule=data, verbose=False)
    names = [path.relative_to(tmp_path / "out").as_posix() for path in callback.files]
    assert names == ["val/predictions.json", "val/predictions_masks.json"]
    results = json.loads(callback.files[0].read_text())
    assert {result["category_id"] for result in results} == {3, 7}
    assert {result["image_id"] for result in results} == set(range(10, 19))
    for result in results:
        assert result.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
        assert isinstance(result["segmentation"]["counts"], str)
        assert result["segmentation"]["size"] == [60, 80]
        assert all(isinstance(value, float) for value in (*result["bbox"], result["score"]))
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_two_processes_measure_and_write_what_one_does(tmp_path: Path) -> None:
    # Nine pictures, so that the processes have different numbers of them; the second one detects nothing.
    root = made(tmp_path).root
    script = Path(__file__).parents[1] / "oracle.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, script, root, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    distributed = json.loads((tmp_path / "metrics.json").read_text())

    data = CocoDataModule(str(root), num_workers=0)
    single = trainer(tmp_path, callbacks=[CocoResults(str(tmp_path / "single"))])
    single.validate(oracle_task(data, silent=SILENT), datamodule=data, verbose=False)
    expected = {key: value.item() for key, value in single.callback_metrics.items()}
    assert len(expected) == 24
    assert 0.05 < expected["val/box_ap"] < 0.95
    for key, value in expected.items():
        assert distributed[key] == pytest.approx(value, abs=0, nan_ok=True), key
    one, two = (json.loads((d / "val" / "predictions.json").read_text()) for d in (tmp_path / "single", tmp_path))
    assert sorted(one, key=json.dumps) == sorted(two, key=json.dumps)


def picture(number: int, boxes: list[list[float]], **more: Any) -> dict[str, Any]:
    labels = torch.ones(len(boxes), dtype=torch.int64)
    return {"image_id": number, "boxes": torch.tensor(boxes).reshape(-1, 4), "labels": labels} | more


def test_a_repeated_picture_counts_once() -> None:
    truth = picture(1, [[0, 0, 10, 10]])
    right, wrong = (picture(1, [box], scores=torch.tensor([0.9])) for box in ([0, 0, 10, 10], [20, 20, 30, 30]))
    metrics = DetectionMetrics()
    metrics.update([right], [truth])
    metrics.update([wrong], [picture(2, [[0, 0, 10, 10]])])
    once = metrics.compute()["box_ap"]
    metrics.update([wrong], [picture(2, [[0, 0, 10, 10]])])
    assert metrics.compute()["box_ap"] == once
    assert 0.4 < once < 0.6


@pytest.mark.parametrize("masks", [False, True])
def test_nothing_there_and_nothing_found(masks: bool) -> None:
    metrics = DetectionMetrics(masks, per_class=True)
    nothing = picture(1, [], scores=torch.zeros(0), segmentation=[], masks=torch.zeros(0, 8, 8, dtype=torch.uint8))
    metrics.update([nothing], [nothing])
    computed = metrics.compute()
    assert math.isnan(computed["box_ap"])
    assert math.isnan(computed["box_ar_large"])
    assert len(computed["classes"]) == 0


def test_masks_survive_run_lengths() -> None:
    masks = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    masks[1] = False
    encoded = encode_masks(masks)
    assert torch.equal(decode_masks(encoded, (7, 5)), masks)
    assert json.loads(json.dumps(encoded)) == encoded
    assert encode_masks(masks[:0]) == []
    assert decode_masks([], (7, 5)).shape == (0, 7, 5)
    # what is kept does not grow with the picture: a rectangle in 64 times the pixels
    large = torch.zeros(1, 800, 800)
    large[:, 100:700, 100:700] = 1
    small = large[:, ::8, ::8]
    assert len(encode_masks(large)[0]["counts"]) < 8 * len(encode_masks(small)[0]["counts"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory from /proc")
def test_memory_does_not_grow_with_the_pictures() -> None:
    # Kept between large masks that come and go, the records of 150 pictures once held 700 MB: in most processes, as it
    # depends on where the heap happens to lie. Hence several, and all masks in the heap.
    script = Path(__file__).with_name("growth.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**25)
    command = [sys.executable, str(script), "150"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    grown = [int(run.communicate(timeout=240)[0]) for run in runs]
    assert max(grown) < 200


def test_records_survive_blocks_copies_and_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection_metrics, "_BLOCK", 600)
    one, other = DetectionMetrics(masks=True, per_class=True), DetectionMetrics(masks=True, per_class=True)
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for number in (5, 3, 9, 4, 7):
        count = int(torch.randint(0, 6, (), generator=generator))
        corners = (torch.rand(count, 2, generator=generator) * 20).round()
        boxes = torch.cat([corners, corners + 12], dim=1)
        masks = torch.zeros(count, 40, 50, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        target = picture(
            number, boxes.tolist(), masks=masks, iscrowd=torch.arange(count) % 3 // 2, area=masks.sum((1, 2))
        )
        found = picture(number, (boxes + 1).tolist(), scores=torch.rand(count, generator=generator))
        pictures.append((found | {"segmentation": encode_masks(masks.roll(1, 2))}, target))
    for found, target in pictures:
        one.update([found], [target])
    assert len(one.records) > 2
    other = pickle.loads(pickle.dumps(one))
    expected = one.compute()
    assert 0.05 < expected["mask_ap"] < 1
    assert not one.detection_box  # what was unpacked is gone again
    for metrics in (other, one):
        assert all(torch.equal(metrics.compute()[key].nan_to_num(-1), expected[key].nan_to_num(-1)) for key in expected)
        metrics.reset()
        assert metrics.records == []
        for found, target in reversed(pictures):
            metrics.update([found], [target])
        assert all(
            torch.allclose(metrics.compute()[key], expected[key], atol=0, rtol=0, equal_nan=True) for key in expected
        )
