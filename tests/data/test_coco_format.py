"""Annotation files as arrays: batches give what single entries give, and loading processes share them."""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from lk_backbones.data.coco_format import CocoFile, read_coco
from lk_backbones.data.coco_format.arrays import Unusual
from lk_backbones.data.coco_format.tables import Annotations

from .conftest import COCO_MINI, CocoMaker
from .test_coco import make


def tensors(file: CocoFile) -> dict[str, torch.Tensor]:
    return {key: value for key, value in vars(file).items() if isinstance(value, torch.Tensor)}


ODD: list[Any] = [None, True, -1, 0, 2, 1e30, -1e9, 10**30, float("nan"), float("inf"), 1.5, "", "7", "~o", [], [[]]]
ODD += [[1, 2], [[1, 2, 3, 4]], {}, {"size": [60, 80]}, {"size": [60, 80], "counts": "0"}, [[0, 0, 1e5, 1e5, 0, 5]]]


def changed(content: Any, rng: random.Random) -> Any:
    """A copy in which one value, anywhere, is another one, gone, or doubled."""
    content = copy.deepcopy(content)
    holder, key = {"": content}, ""
    while True:
        value = holder[key]  # type: ignore[index]
        if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
            break
        holder, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))  # type: ignore
    way = rng.random()
    if way < 0.2:
        del holder[key]
    elif way < 0.3 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))  # type: ignore[index]
    else:
        holder[key] = rng.choice(ODD)
    return content[""] if "" in content and len(content) == 1 else content


def outcome(path: Path) -> Any:
    """The file as read and its masks as drawn, or the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = read_coco(path)
    except ValueError as error:
        return str(error)
    masks = [file.outlines(place).draw() for place in range(len(file)) if file.without_mask is None]
    return tensors(file), masks


def test_whatever_is_changed_is_read_or_refused_by_name(
    coco: CocoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    path = tmp_path / "changed.json"
    refused = 0
    for _ in range(600):
        content = changed(coco.train, rng)
        path.write_text(json.dumps(content))
        one = outcome(path)
        with monkeypatch.context() as patch:  # every annotation is looked at by itself

            def unusual(self: Any, entries: list[Any], usual: Any = Annotations._add) -> None:
                if not hasattr(self, "again"):
                    self.again = True
                    raise Unusual
                del self.again
                usual(self, entries)

            patch.setattr(Annotations, "_add", unusual)
            other = outcome(path)
        if isinstance(one, str):
            refused += 1
            assert one == other
            assert "changed.json" in one
        else:
            assert one[0].keys() == other[0].keys()
            assert all(torch.equal(one[0][key], other[0][key]) or torch.isnan(one[0][key]).any() for key in one[0])
            assert all((a == b).all() for a, b in zip(one[1], other[1], strict=True))
    assert 100 < refused < 550


def test_annotations_before_pictures_and_categories(coco: CocoMaker, tmp_path: Path) -> None:
    content = coco.train
    (tmp_path / "usual.json").write_text(json.dumps(content))
    turned = {key: content[key] for key in ("annotations", "categories", "images")} | {"info": {"a": [1]}}
    (tmp_path / "turned.json").write_text(json.dumps(turned, indent=1))
    usual, other = (tensors(read_coco(tmp_path / f"{name}.json")) for name in ("usual", "turned"))
    assert usual["ids"].tolist() == [100, 101, 102, 103, 104]
    assert all(torch.equal(usual[key], other[key]) for key in usual)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs the COCO pictures, which are not shipped")
def test_spawned_workers_get_tensors_that_are_shared() -> None:
    data = make(COCO_MINI)
    data.setup("validate")
    dataset = data.dataset("val")
    file = dataset.file
    pickled = io.BytesIO()
    ForkingPickler(pickled).dump(file)
    assert len(pickled.getvalue()) < 20_000  # the names of the tensors, and the classes
    assert file.coordinates.is_shared()
    assert file.counts.is_shared()


def test_spawned_workers_give_the_same(coco: CocoMaker) -> None:
    data = make(coco.write())
    data.setup("validate")
    loader = torch.utils.data.DataLoader(
        data.dataset("val"), num_workers=1, collate_fn=data.collate, multiprocessing_context="spawn"
    )
    for (images, targets), (same, others) in zip(loader, data.val_dataloader(), strict=True):
        assert torch.equal(images[0], same[0])
        assert torch.equal(targets[0]["masks"], others[0]["masks"])
        assert torch.equal(targets[0]["boxes"], others[0]["boxes"])
