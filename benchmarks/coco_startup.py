"""Start-up at COCO's size: time, peak of memory and what the workers take, beside pycocotools.

A file of 118 287 pictures and 860 001 annotations (some 600 MB) is written into a temporary folder. Each contestant
reads it in a fresh process, in turn; times are CPU times, memory is beyond what the process held after its imports::

    python benchmarks/coco_startup.py                 # takes minutes, and 6 GB
    python benchmarks/coco_startup.py --share 0.1     # a tenth of it
    python benchmarks/coco_startup.py --file data/coco/annotations/instances_train2017.json
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path, images: int, annotations: int) -> None:
    """Write a made-up file: polygons of 6 to 56 corners, one crowd in 86 as uncompressed run lengths."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write('{"info": {"description": "made up"}, "images": [')
        for number in range(images):
            name = f"{number:012d}.jpg"
            image = {"license": 3, "file_name": name, "coco_url": f"http://images.example.org/train2017/{name}"}
            image |= {"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": number}
            file.write((", " if number else "") + json.dumps(image))
        file.write('], "annotations": [')
        image_ids = np.sort(rng.integers(0, images, annotations)).tolist()
        for number, image_id in enumerate(image_ids):
            segmentation: Any
            if number % 86 == 0:
                counts = rng.integers(1, 300, 1000)
                counts = counts * (480 * 640) // counts.sum()
                counts[-1] += 480 * 640 - counts.sum()
                segmentation = {"counts": counts.tolist(), "size": [480, 640]}
            else:
                segmentation = [(rng.integers(0, 48000, 2 * rng.integers(6, 57)) / 100).tolist()]
            entry = {"segmentation": segmentation, "area": 1234.5678, "iscrowd": int(number % 86 == 0)}
            box = [*(rng.integers(0, 48000, 2) / 100).tolist(), 120.5, 100.25]
            entry |= {"image_id": image_id, "bbox": box, "category_id": number % 80 + 1, "id": number + 1}
            file.write((", " if number else "") + json.dumps(entry))
        categories = [{"supercategory": "thing", "id": number + 1, "name": f"class {number}"} for number in range(80)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def own_memory() -> float:
    """Megabytes that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def in_worker(file: Any, queue: Any) -> None:
    """Look at every picture, as an epoch does, and say what memory that took."""
    before = own_memory()
    for place in range(len(file)):
        file.image(place)
        file.outlines(place)
    queue.put(own_memory() - before)


def measure(contestant: str, path: Path) -> dict[str, float]:
    """Read the file in this process."""
    reader: Any
    if contestant == "pycocotools":
        from pycocotools.coco import COCO

        reader = COCO
    else:
        from lk_backbones.data.coco_format import read_coco

        reader = read_coco
    before, start = resident(), time.process_time()
    held = reader(path if contestant == "ours" else str(path))
    result = {"seconds": time.process_time() - start, "held MB": resident() - before}
    result["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if contestant == "ours":
        for method in ("fork", "spawn"):
            context = multiprocessing.get_context(method)
            queue = context.SimpleQueue()
            worker = context.Process(target=in_worker, args=(held, queue))
            worker.start()
            result[f"worker's own MB, {method}"] = queue.get()
            worker.join()
        pickled = io.BytesIO()
        ForkingPickler(pickled).dump(held)
        result["pickled for a worker, kB"] = len(pickled.getvalue()) / 1000
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of COCO's size")
    parser.add_argument("--file", type=Path, help="annotations to read instead of made-up ones")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print("RESULT", json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.file or Path(folder, "instances.json")
        if not arguments.file:
            write(path, int(118_287 * arguments.share), int(860_001 * arguments.share))
        print(f"{path.stat().st_size / 1e6:.0f} MB")
        best: dict[str, dict[str, float]] = {}
        for _ in range(arguments.rounds):
            for contestant in ("ours", "pycocotools"):
                command = [sys.executable, __file__, "--measure", contestant, str(path)]
                run = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
                result = json.loads(run.stdout.split("RESULT ")[1])
                kept = best.setdefault(contestant, result)
                best[contestant] = {key: min(kept[key], result[key]) for key in result}
    for contestant, result in best.items():
        print(f"{contestant:12}", ", ".join(f"{key}: {value:.1f}" for key, value in result.items()))
    ours, theirs = best["ours"], best["pycocotools"]
    print("ratio       ", ", ".join(f"{key}: {ours[key] / theirs[key]:.2f}" for key in theirs))


if __name__ == "__main__":
    main()
