from __future__ import annotations

import numpy as np
import pytest
import torch

from lk_backbones.data import SyntheticScenesDataModule
from lk_backbones.data.scenes.canvas import GREEN_LIGHT, RED_LIGHT
from lk_backbones.data.scenes.drawing import (
    MOVING_VEHICLE,
    PERSON,
    SCENE_CLASSES,
    SIGNAL,
    STOPPED_VEHICLE,
    TREE,
    Scene,
    draw_scene,
)

COUNT = 60


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng(i), 128, 192) for i in range(COUNT)]


def signals(scene: Scene) -> list[tuple[float, float, bool]]:
    """(x, y, green) of every signal from left to right, read off the picture and not off the generator."""
    places = [i + 1 for i, kind in enumerate(scene.objects) if kind == SIGNAL]
    found = []
    for place in places:
        rows, columns = np.nonzero(scene.instances == place)
        colors = scene.image[rows, columns].astype(int)
        green = np.abs(colors - GREEN_LIGHT).sum(1).min() < np.abs(colors - RED_LIGHT).sum(1).min()
        found.append((columns.mean(), rows.mean(), bool(green)))
    return sorted(found)


def test_vehicle_class_follows_from_the_signal_of_its_lane(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        lights = signals(scene)
        # Lanes fan out from the vanishing point; the kerbs of the drawn road give their borders in every row.
        for place, kind in enumerate(scene.objects, start=1):
            if kind not in (MOVING_VEHICLE, STOPPED_VEHICLE):
                continue
            rows, columns = np.nonzero(scene.instances == place)
            if len(rows) < 40:
                continue
            foot = rows.max()
            road = np.nonzero(np.isin(scene.mask[foot], (2, MOVING_VEHICLE, STOPPED_VEHICLE)))[0]
            center = (columns.min() + columns.max() + 1) / 2
            lane = int((center - road.min()) / (road.max() + 1 - road.min()) * len(lights))
            if abs((center - road.min()) / (road.max() + 1 - road.min()) * len(lights) - lane - 0.5) > 0.2:
                continue  # partly hidden: its visible middle is not its middle
            assert (kind == MOVING_VEHICLE) == lights[lane][2]
            checked += 1
    assert checked > COUNT


def test_signals_are_balanced_visible_and_far_away(scenes: list[Scene]) -> None:
    distances = []
    for scene in scenes:
        lights = signals(scene)
        assert len(lights) in (2, 4)
        assert sum(green for *_, green in lights) == len(lights) // 2
        vehicles = np.isin(scene.mask, (MOVING_VEHICLE, STOPPED_VEHICLE))
        distances.append(np.nonzero(vehicles)[0] - np.mean([y for _, y, _ in lights]))
        sizes = [(scene.instances == i).sum() for i, kind in enumerate(scene.objects, 1) if kind == SIGNAL]
        assert min(sizes) > 0.8 * max(sizes)  # none is hidden, not even partly
    assert np.percentile(np.concatenate(distances), 1) > 35
    assert 60 < np.median(np.concatenate(distances)) < 80


def test_both_vehicle_classes_are_frequent_and_equally_so(scenes: list[Scene]) -> None:
    share = np.bincount(np.concatenate([scene.mask.ravel() for scene in scenes]), minlength=9) / (COUNT * 128 * 192)
    assert share[MOVING_VEHICLE] + share[STOPPED_VEHICLE] > 0.09
    assert 0.7 < share[MOVING_VEHICLE] / share[STOPPED_VEHICLE] < 1.4
    assert (share > 0.005).all()


def test_vehicles_of_both_classes_look_alike(scenes: list[Scene]) -> None:
    """Mean colour, size and place differ by less than chance allows (three standard errors)."""
    features: dict[int, list[list[float]]] = {MOVING_VEHICLE: [], STOPPED_VEHICLE: []}
    for scene in scenes:
        for place, kind in enumerate(scene.objects, start=1):
            rows, columns = np.nonzero(scene.instances == place)
            if kind in features and len(rows):
                colors = scene.image[rows, columns].mean(0)
                features[kind].append([*colors, len(rows), rows.mean(), columns.mean()])
    moving, stopped = np.array(features[MOVING_VEHICLE]), np.array(features[STOPPED_VEHICLE])
    error = np.sqrt(moving.var(0) / len(moving) + stopped.var(0) / len(stopped))
    assert (np.abs(moving.mean(0) - stopped.mean(0)) < 3 * error).all()


def test_only_labels_differ_when_signals_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all signals turned round, the picture below them stays the same to the last pixel."""
    scene = draw_scene(np.random.default_rng(5), 128, 192)

    class Turned:
        def __init__(self, rng: np.random.Generator):
            self.rng = rng

        def __getattr__(self, name: str) -> object:
            return getattr(self.rng, name)

        def permutation(self, values: np.ndarray) -> np.ndarray:
            return ~self.rng.permutation(values)

    turned = draw_scene(Turned(np.random.default_rng(5)), 128, 192)  # type: ignore[arg-type]
    below = max(y for _, y, _ in signals(scene)) + 8
    assert np.array_equal(scene.image[int(below) :], turned.image[int(below) :])
    assert not np.array_equal(scene.image, turned.image)
    swap = np.arange(9)
    swap[[MOVING_VEHICLE, STOPPED_VEHICLE]] = STOPPED_VEHICLE, MOVING_VEHICLE
    assert np.array_equal(swap[scene.mask], turned.mask)


def test_objects_agree_with_the_mask(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.instances.max() <= len(scene.objects)
        inside = scene.instances > 0
        assert np.array_equal(np.asarray(scene.objects)[scene.instances[inside] - 1], scene.mask[inside])
        assert np.isin(scene.mask[inside], (TREE, PERSON, SIGNAL, MOVING_VEHICLE, STOPPED_VEHICLE)).all()
        # the frame that the signals hang from has their class and is no object
        assert not np.isin(scene.mask[~inside], (TREE, PERSON, MOVING_VEHICLE, STOPPED_VEHICLE)).any()


def test_same_number_same_scene() -> None:
    data = SyntheticScenesDataModule(image_size=(64, 96), train_images=3, num_workers=0)
    data.setup()
    for split in ("train", "val", "test"):
        one, other = data.dataset(split).load(1), data.dataset(split).load(1)
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])
        assert not np.array_equal(one[0], data.dataset(split).load(0)[0])
    assert not np.array_equal(data.dataset("train").load(1)[0], data.dataset("val").load(1)[0])
    moved = SyntheticScenesDataModule(image_size=(64, 96), scene_seed=1)
    moved.setup()
    assert not np.array_equal(moved.dataset("val").load(1)[0], data.dataset("val").load(1)[0])
    with pytest.raises(IndexError, match="3 scenes, numbered from 0; there is no scene 3"):
        data.dataset("train").load(3)


def test_batches_and_attributes() -> None:
    data = SyntheticScenesDataModule(
        image_size=(96, 160), train_images=9, val_images=5, test_images=4, batch_size=4, val_batch_size=3, num_workers=0
    )
    assert (data.num_classes, data.ignore_index) == (9, 255)
    assert data.class_names == list(SCENE_CLASSES.names)
    assert data.class_names[-2:] == ["moving vehicle", "stopped vehicle"]
    assert len(set(data.class_colors)) == 9
    data.setup()
    assert [tuple(batch["image"].shape) for batch in data.train_dataloader()] == [(4, 3, 96, 160)] * 2
    batches = list(data.val_dataloader())
    assert [len(batch["path"]) for batch in batches] == [3, 2]
    assert batches[0]["path"][0] == "scene_val_00000"
    assert batches[0]["original_size"][0] == (96, 160)
    scene = data.dataset("val").load(0)
    assert torch.equal(batches[0]["image"][0], torch.from_numpy(scene[0]).permute(2, 0, 1) / 255)
    assert torch.equal(batches[0]["mask"][0], torch.from_numpy(scene[1]).long())
    assert [path for batch in data.predict_dataloader() for path in batch["path"]][-1] == "scene_test_00003"
    assert len(list(data.test_dataloader())) == 2


def test_augmentation_keeps_labels_true_and_draws_are_independent() -> None:
    """Flip and brightness are separate chances: together in a quarter of the cases, not always or never."""
    data = SyntheticScenesDataModule(image_size=(64, 64), train_images=1, num_workers=0)
    data.setup("fit")
    dataset = data.dataset("train")
    image, mask = dataset.load(0)
    from lk_backbones.data.sampling import SampleKey

    table = np.zeros((2, 2), int)
    for seed in range(300):
        sample = dataset[SampleKey(0, seed)]
        flipped = not np.array_equal(sample["mask"], mask)
        assert np.array_equal(sample["mask"], mask[:, ::-1] if flipped else mask)
        plain = image[:, ::-1] if flipped else image
        brightened = np.abs(sample["image"].permute(1, 2, 0).numpy() * 255 - plain).max() > 0.5
        table[int(flipped), int(brightened)] += 1
    assert (table > 45).all(), table  # 75 expected; standard error 7.5


def test_unusable_sizes_are_refused() -> None:
    for options, message in (
        ({"image_size": (32, 64)}, "image_size must be .* got"),
        ({"image_size": (128, 96)}, "width >= height"),
        ({"val_images": 0}, "val_images must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SyntheticScenesDataModule(**options)
    with pytest.raises(ValueError, match="at least 64 pixels high"):
        draw_scene(np.random.default_rng(0), 32, 64)
