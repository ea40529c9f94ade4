"""Checks of data sets on disk, made before training starts: folders, pairs, sizes, labels.

Every finding is one error that names the file or folder and says what would be right.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.progress import track

from lk_backbones.data.reading import IMAGE_EXTENSIONS, image_size

#: From this many files on a progress bar is shown.
_PROGRESS_FROM = 500


def require_folders(root: Path, folders: Sequence[str], layout: str) -> None:
    """Check that a data set's sub-folders exist.

    Args:
        root: The data set's folder, as the user gave it.
        folders: Sub-folders that must exist, relative to ``root``, with forward slashes.
        layout: The expected layout in words, for the message.

    Raises:
        FileNotFoundError: If one is missing; the message names it, what was found instead, and a better root if one is
            near.
    """
    if not root.is_dir():
        parent = next(p for p in (*root.absolute().parents, Path()) if p.is_dir())
        raise FileNotFoundError(f"There is no folder {root}. In {parent} there is: {_listing(parent)}.")
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if not missing:
        return
    near = [root.absolute().parent, *(path for path in sorted(root.iterdir()) if path.is_dir())]
    better = next((path for path in near if all((path / folder).is_dir() for folder in folders)), None)
    hint = f" Did you mean root={str(better)!r}?" if better else ""
    where = root
    for part in Path(missing[0]).parts:  # list the deepest folder that does exist: that is where to look
        if not (where / part).is_dir():
            break
        where = where / part
    raise FileNotFoundError(
        f"{root} has no sub-folder {missing[0]!r}. In {where} there is: {_listing(where)}. Expected: {layout}.{hint}"
    )


def _listing(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "nothing"


def leads_outside(folder: Path, path: Path) -> bool:
    """Say whether a path below a folder leads out of it by a symbolic link; the folder itself may be one."""
    inside = _real_folder(os.path.abspath(folder))
    if path.is_symlink():
        real = os.path.realpath(path)
    else:
        real = os.path.join(_real_folder(os.path.abspath(path.parent)), path.name)
    return not real.startswith(os.path.join(inside, ""))


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def require_files(files: Sequence[Path], folder: Path, extensions: Iterable[str] = IMAGE_EXTENSIONS) -> None:
    """Check that a folder holds any files.

    Raises:
        FileNotFoundError: If it does not.
    """
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(extensions)}). It holds: {_listing(folder)}.")


def pair_by_name(
    images: Sequence[Path],
    masks: Sequence[Path],
    image_key: Callable[[Path], str],
    mask_key: Callable[[Path], str],
    mask_folder: Path,
    example: Callable[[str], str],
) -> list[tuple[Path, Path]]:
    """Match images and masks by a key made from their paths.

    Args:
        images: Image files.
        masks: Mask files.
        image_key: Key of an image.
        mask_key: Key of a mask.
        mask_folder: Where masks are looked for; for messages.
        example: Name of the mask that belongs to a key; for messages.

    Returns:
        The pairs, in the order of ``images``.

    Raises:
        FileNotFoundError: If an image has no mask, or a mask has no image.
        ValueError: If two images or two masks have the same key.
    """
    image_of, mask_of = _index(images, image_key, "images"), _index(masks, mask_key, "masks")
    lonely = [image_of[key] for key in image_of if key not in mask_of]
    if lonely:
        raise FileNotFoundError(
            f"{len(lonely)} of {len(images)} images have no mask: {_some(lonely)}. "
            f"The mask of the first should be {mask_folder / example(image_key(lonely[0]))}."
        )
    lonely = [mask_of[key] for key in mask_of if key not in image_of]
    if lonely:
        raise FileNotFoundError(
            f"{len(lonely)} of {len(masks)} masks have no image: {_some(lonely)}. Add the images or remove the masks."
        )
    return [(image, mask_of[key]) for key, image in image_of.items()]


def _index(files: Sequence[Path], key_of: Callable[[Path], str], kind: str) -> dict[str, Path]:
    index: dict[str, Path] = {}
    for path in files:
        first = index.setdefault(key_of(path), path)
        if first is not path:
            raise ValueError(f"Two {kind} have the same name: {first} and {path}. Remove or rename one of them.")
    return index


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")


def check_sizes(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Check, from the headers alone, that every image can be opened and is as large as its mask.

    Raises:
        ValueError: If one is not.
    """

    def check(pair: tuple[Path, Path]) -> None:
        require_same_size(pair[0], image_size(pair[0]), pair[1], image_size(pair[1]))

    for_all(check, pairs, "Checking image sizes")


def require_same_size(image: Path, size: tuple[int, ...], mask: Path, mask_size: tuple[int, ...]) -> None:
    """Check that an image and its mask have the same (height, width).

    Raises:
        ValueError: If they have not.
    """
    if size != mask_size:
        raise ValueError(
            f"The image {image} is {size[1]} wide and {size[0]} high, but its mask {mask} is {mask_size[1]} wide and "
            f"{mask_size[0]} high. Both must have the same size."
        )


def for_all(check: Callable[[Any], object], items: Sequence[Any], title: str) -> None:
    """Run a check over all items in threads, with a progress bar when there are many; the first error is raised."""
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        results = pool.map(check, items)
        hidden = len(items) < _PROGRESS_FROM
        try:
            for _ in track(results, description=title, total=len(items), transient=True, disable=hidden):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # do not go through the rest first
            raise
