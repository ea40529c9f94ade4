"""The Fourier path's bookkeeping: lengths of transforms, and chunks."""

import pytest
import torch

from lk_backbones.ops import _fft


@pytest.mark.parametrize("detour", [_fft.ROWS_DETOUR, _fft.COLUMNS_DETOUR])
def test_lengths_are_even_and_have_small_factors(detour):
    for length in range(1, 400):
        chosen = _fft.good_length(length, detour)
        assert length <= chosen <= 2 * length + 1
        assert chosen % 2 == 0
        for factor in (2, 3, 5, 7):
            while chosen % factor == 0:
                chosen //= factor
        assert chosen == 1


@pytest.mark.parametrize(
    ("side", "kernel", "size"),
    [
        (56, 31, (72, 72)),
        (28, 29, (42, 48)),  # a detour along the columns only
        (56, 51, (84, 96)),
        (64, 51, (96, 96)),
    ],
)
def test_lengths_that_were_measured_to_be_best(side, kernel, size):
    assert _fft.transform_size((side, side), (kernel, kernel)) == size


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("shape", [(1, 128, 56, 56), (8, 256, 28, 28), (3, 1, 9, 9), (5, 19, 300, 200)], ids=str)
def test_chunks_cover_the_input_once_and_are_bounded(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    maps = torch.empty(shape)
    size = _fft.transform_size(shape[2:], (31, 31))
    seen = torch.zeros(shape[:2], dtype=torch.int64)
    sizes = set()
    for channels, image_chunks in _fft._chunks(maps, size):
        sizes.add(len(range(*channels.indices(shape[1]))))
        for images in image_chunks:
            seen[images, channels] += 1
            count = seen[images, channels].numel()
            bound = min(_fft.CHUNK_BYTES * threads, max(_fft.CHUNK_BYTES, _fft.CHUNK_SHARE * maps.nbytes))
            assert count <= 8 or 4 * count * size[0] * size[1] <= bound
    assert (seen == 1).all()
    assert max(sizes) - min(sizes) < max(sizes) / 2
