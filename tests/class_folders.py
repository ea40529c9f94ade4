"""Pictures in class folders, drawn: every class has a colour of its own under noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {
    "blue": (30, 60, 220),
    "green": (40, 200, 60),
    "grey": (120, 120, 120),
    "red": (220, 40, 40),
    "violet": (160, 60, 200),
    "yellow": (240, 220, 50),
}


def draw_picture(name: str, seed: int, height: int = 40, width: int = 52) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 30, (height, width, 3))
    return Image.fromarray(np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8))


def draw_folders(root: Path, counts: dict[str, int], suffix: str = ".jpg") -> Path:
    """Write ``counts`` pictures of every class below the folders that are its keys (``"."`` for the root itself)."""
    for place, (split, count) in enumerate(counts.items()):
        for number, name in enumerate(COLORS):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed = 10_000 * place + 100 * number + i
                draw_picture(name, seed, 40 + i, 52).save(root / split / name / f"{name}_{i}{suffix}")
    return root
