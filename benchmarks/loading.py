"""Loading on this machine: the CPU time of a training sample beside a plain OpenCV pipeline of the same operations.

Made-up pictures of the data sets' sizes and formats are written to a temporary folder. Every sample is read, augmented
and made a tensor by our data set, exactly as a loading process does it, and by the few lines of OpenCV and NumPy that
one would write by hand: without checks, and without the formats, the errors and the exact resuming that ours has. Both
in turn, round after round, on one thread, at the same ratios of the random resize::

    python benchmarks/loading.py
    python benchmarks/loading.py --case cityscapes --seconds 60
    python benchmarks/loading.py --camvid data/camvid         # also on pictures of one's own, in the folder layout
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN

from lk_backbones.analysis.timing import interleave
from lk_backbones.data import ADE20KDataModule, CityscapesDataModule, SegmentationFolderDataModule
from lk_backbones.data.sampling import SampleKey
from lk_backbones.data.segmentation import FileSegmentationDataset, SegmentationDataModule

#: Ratios of the random resize, in place of chance: the costs of the smallest and the largest differ sixteenfold.
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
FILL = IMAGENET_DEFAULT_MEAN
UNIT = np.arange(256, dtype=np.float32) / 255


@dataclass
class Case:
    """One comparison: each function loads the same samples, with the chance that the seed gives."""

    name: str
    samples: int
    ours: Callable[[int], object]
    plain: Callable[[int], object]


# --- made-up pictures -----------------------------------------------------------------------------------------------


def draw_picture(height: int, width: int, seed: int) -> np.ndarray:
    """Make a smooth RGB picture with the noise of a camera, so that files are about as large as real ones."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.integers(0, 256, (12, 24, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth + rng.normal(0, 1, smooth.shape)).clip(0, 255).astype(np.uint8)


def draw_labels(height: int, width: int, classes: int, seed: int) -> np.ndarray:
    """Blocks of labels with uneven borders."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, classes, (height // 40 + 1, width // 40 + 1), np.uint8)
    labels = blocks.repeat(40, 0).repeat(40, 1)[:height, :width]
    rows = np.roll(np.arange(height), 7)[:, None]
    return np.ascontiguousarray(labels[rows, (np.arange(width) + rows % 11) % width])


def write(path: Path, picture: np.ndarray) -> None:
    """Write a picture as most programs do: OpenCV's PNG files are quicker to read, as it filters their rows less."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=90)


# --- segmentation ---------------------------------------------------------------------------------------------------


class PlainSegmentation:
    """The published training pipeline by hand."""

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], lookup: np.ndarray, crop: int, base: tuple[int, int] | None
    ) -> None:
        self.pairs = pairs
        self.lookup = lookup
        self.crop = crop
        self.base = base

    def __call__(self, index: int, ratio: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(seed)
        image_file, mask_file = self.pairs[index]
        image = cv2.cvtColor(cv2.imread(str(image_file)), cv2.COLOR_BGR2RGB)
        mask = cv2.LUT(cv2.imread(str(mask_file), cv2.IMREAD_UNCHANGED), self.lookup)
        height, width = mask.shape
        if self.base is not None:
            ratio *= min(max(self.base) / max(height, width), min(self.base) / min(height, width))
        size = int(width * ratio + 0.5), int(height * ratio + 0.5)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        for _ in range(11):
            top = rng.randint(0, max(mask.shape[0] - self.crop, 0))
            left = rng.randint(0, max(mask.shape[1] - self.crop, 0))
            part = mask[top : top + self.crop, left : left + self.crop]
            counts = np.bincount(part.ravel(), minlength=256)[:255]
            if np.count_nonzero(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        image, mask = image[top : top + self.crop, left : left + self.crop], part
        if rng.random() < 0.5:
            image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
        image = distort(image, rng)
        scaled = cv2.LUT(image, UNIT)
        bottom, right = self.crop - mask.shape[0], self.crop - mask.shape[1]
        if bottom or right:
            scaled = cv2.copyMakeBorder(scaled, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=FILL)
            mask = cv2.copyMakeBorder(mask, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=255)
        tensor = torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))
        return tensor, torch.from_numpy(np.ascontiguousarray(mask)).long()


def distort(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 1/2, in 8 bits as mmsegmentation does it."""
    if rng.random() < 0.5:
        image = shift(image, 1.0, rng.uniform(-32, 32))
    first = rng.random() < 0.5
    if first and rng.random() < 0.5:
        image = shift(image, rng.uniform(0.5, 1.5), 0)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = shift(hsv[..., 1], rng.uniform(0.5, 1.5), 0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.randint(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not first and rng.random() < 0.5:
        image = shift(image, rng.uniform(0.5, 1.5), 0)
    return image


def shift(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """``values * factor + offset``, clipped to 8 bits."""
    table = (np.arange(256) * factor + offset).clip(0, 255).astype(np.uint8)
    return cv2.LUT(np.ascontiguousarray(values), table)


def segmentation_case(name: str, make: Callable[[tuple[float, float]], SegmentationDataModule]) -> Case:
    """Compare a data module's training samples; ``make`` builds it with the given range of the random ratio."""
    modules = [make((ratio, ratio)) for ratio in RATIOS]
    datasets: list[FileSegmentationDataset] = [module.make_dataset("train") for module in modules]  # type: ignore[misc]
    first, module = datasets[0], modules[0]
    assert first.masks is not None
    lookup = first.table.lookup()[:256].astype(np.uint8)
    pairs = list(zip(first.images, first.masks, strict=True))
    plain = PlainSegmentation(pairs, lookup, module.crop_size[0], module.base_size)

    def ours_run(seed: int) -> None:
        for place, dataset in enumerate(datasets):
            dataset[SampleKey((seed + place) % len(first), 1000 * seed + place)]

    def plain_run(seed: int) -> None:
        for place, ratio in enumerate(RATIOS):
            plain((seed + place) % len(first), ratio, 1000 * seed + place)

    return Case(name, len(RATIOS), ours_run, plain_run)


def cityscapes(folder: Path) -> Case:
    """Pictures and labels of 2048×1024 as PNG."""
    for i in range(2):
        stem = f"train/city/city_{i:06d}_000019"
        write(folder / "leftImg8bit" / f"{stem}_leftImg8bit.png", draw_picture(1024, 2048, i))
        write(folder / "gtFine" / f"{stem}_gtFine_labelIds.png", draw_labels(1024, 2048, 34, i))
    return segmentation_case("Cityscapes", lambda ratios: CityscapesDataModule(str(folder), scale_range=ratios))


def ade20k(folder: Path) -> Case:
    """Pictures of ADE20K's median size as JPEG, labels as PNG."""
    for i in range(6):
        size = (512, 683) if i % 3 else (683, 512)
        write(folder / "images" / "training" / f"ADE_train_{i:08d}.jpg", draw_picture(*size, i))
        write(folder / "annotations" / "training" / f"ADE_train_{i:08d}.png", draw_labels(*size, 151, i))
    return segmentation_case("ADE20K", lambda ratios: ADE20KDataModule(str(folder), scale_range=ratios))


def own(folder: Path) -> Case:
    """Real pictures in the folder layout, crops of 360."""
    return segmentation_case(
        folder.name, lambda ratios: SegmentationFolderDataModule(str(folder), crop_size=360, scale_range=ratios)
    )


# --- the comparison -------------------------------------------------------------------------------------------------

#: Every case writes its files into the folder that it is given.
CASES: dict[str, Callable[[Path], Case]] = {"cityscapes": cityscapes, "ade20k": ade20k}


def compare(case: Case, seconds: float) -> str:
    """Time a case; returns a row of the table."""
    seeds = {"ours": iter(range(1, 10**9)), "plain": iter(range(1, 10**9))}  # the same ones for both
    timings = interleave(
        {"ours": lambda: case.ours(next(seeds["ours"])), "plain": lambda: case.plain(next(seeds["plain"]))},
        seconds,
        clock=time.process_time,
        patience=float("inf"),
    )
    rounds = min(len(timing.calls) for timing in timings.values())
    ours, plain = (sum(timings[name].calls[:rounds]) / rounds / case.samples for name in ("ours", "plain"))
    best = timings["ours"].best / timings["plain"].best
    return f"| {case.name} | {ours:.1f} | {plain:.1f} | {ours / plain:.2f} | {best:.2f} | {rounds * case.samples} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), nargs="*", default=sorted(CASES))
    parser.add_argument("--camvid", type=Path, metavar="FOLDER", help="also compare on this folder of pictures")
    parser.add_argument("--seconds", type=float, default=30, help="per case")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)  # as in a loading process
    torch.set_num_threads(1)
    print("CPU time per training sample in milliseconds\n")
    print("| case | ours | plain OpenCV | ratio | ratio of the best rounds | samples |\n|---|---|---|---|---|---|")
    for name in arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(CASES[name](Path(folder)), arguments.seconds), flush=True)
    if arguments.camvid:
        print(compare(own(arguments.camvid), arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
