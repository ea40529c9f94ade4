"""Loading for classification on this machine: the time of a training sample by our pipeline, timm's and torchvision's.

Every contestant reads the same files, crops and flips at random, to 224 x 224, with and without RandAugment (two
operations of strength 9): timm's pipeline on PIL pictures, ours (the same, with JPEG files decoded as small as the crop
allows), and torchvision's v2 on tensors that its own decoder gives. In turn, round after round, on one thread::

    python benchmarks/classification_loading.py                       # made-up pictures of 500 x 375 and of 2592 x 1944
    python benchmarks/classification_loading.py --folder my/pictures  # JPEG files of one's own
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from lk_backbones.analysis.timing import interleave
from lk_backbones.data.classification import FileClassificationDataset
from lk_backbones.data.classification_transforms import Augmentation, PictureSettings, posterize, train_transform
from lk_backbones.data.sampling import SampleKey

SIZE = 224


def draw_pictures(folder: Path, width: int, height: int, count: int = 8) -> list[Path]:
    """Write smooth pictures with the noise of a camera, so that files are about as large as real ones."""
    paths = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        smooth = cv2.resize(rng.integers(0, 256, (24, 32, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{width}_{seed}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=92)
    return paths


def contestants(paths: list[Path], augment: str | None) -> dict[str, Callable[[], object]]:
    settings = PictureSettings(train_size=(SIZE, SIZE))
    augmentation = Augmentation(auto_augment=augment, color_jitter=0.0, interpolation="bilinear")
    names = [path.name for path in paths]
    ours = FileClassificationDataset(
        paths[0].parent, names, [0] * len(paths), train_transform(settings, augmentation), training=True
    )
    timms = create_transform(
        SIZE, is_training=True, auto_augment=augment, color_jitter=0.0, interpolation="bilinear", normalize=False
    )
    for transform in timms.transforms:
        for operation in getattr(transform, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize  # timm's fails with Pillow 13
    tensors = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment(2, 9)] if augment else []),
        ]
    )
    number = iter(range(10**9))

    def by_us() -> object:
        i = next(number)
        return ours[SampleKey(i % len(paths), i)]["image"]

    def by_timm() -> object:
        return timms(Image.open(paths[next(number) % len(paths)]).convert("RGB"))

    def by_torchvision() -> object:
        data = read_file(str(paths[next(number) % len(paths)]))
        return tensors(decode_jpeg(data, mode=ImageReadMode.RGB))

    return {"ours": by_us, "timm": by_timm, "torchvision v2": by_torchvision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="JPEG files of one's own")
    parser.add_argument("--seconds", type=float, default=8, help="for every line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if options.folder is not None:
            cases = {str(options.folder.name): sorted(options.folder.glob("*.jpg"))[:200]}
        else:
            cases = {f"{w} x {h}": draw_pictures(Path(folder), w, h) for w, h in ((500, 375), (2592, 1944))}
        print("milliseconds per sample, mean")
        for name, paths in cases.items():
            for augment in (None, "rand-m9-n2-mstd0.5-inc1"):
                timings = interleave(contestants(paths, augment), options.seconds)
                means = {key: sum(t.calls) / len(t.calls) for key, t in timings.items()}
                kind = "RandAugment" if augment else "crop, flip"
                print(f"{name:>12}, {kind:11}: " + ", ".join(f"{key} {mean:.2f}" for key, mean in means.items()))


if __name__ == "__main__":
    main()
