"""Padding, windows and augmentation against brute force."""

import pytest
import torch
import torch.nn.functional as F

from lk_backbones.tasks.inference import augmented_probabilities, pad_to_multiple, resize, scaled_size, sliding_window


def position_free(image: torch.Tensor) -> torch.Tensor:
    """A "network" that sees single pixels only, so that windows and padding must not change anything."""
    return torch.stack([image.sum(1), image[:, 0] * 2, image[:, 1] ** 2], dim=1)


def local_mean(image: torch.Tensor) -> torch.Tensor:
    """A "network" whose output depends on where its window begins and ends."""
    return F.conv2d(F.pad(image, (1, 1, 1, 1)), torch.ones(2, 3, 3, 3) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))


def test_pad_to_multiple() -> None:
    image = torch.rand(2, 3, 33, 64)
    padded = pad_to_multiple(image, 32)
    assert padded.shape == (2, 3, 64, 64)
    torch.testing.assert_close(padded[:, :, :33], image)
    assert not padded[:, :, 33:].any()
    assert pad_to_multiple(image, 1) is image
    assert pad_to_multiple(image, 16, 64).shape == (2, 3, 64, 64)


def test_resize_respects_align_corners() -> None:
    x = torch.arange(3.0).view(1, 1, 1, 3).expand(1, 1, 2, 3)
    assert resize(x, (2, 3)) is x
    torch.testing.assert_close(resize(x, (2, 5), True)[0, 0, 0], torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))
    torch.testing.assert_close(resize(x, (2, 6), False)[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0]))


@pytest.mark.parametrize(("size", "window", "stride"), [((20, 31), (8, 8), (5, 3)), ((7, 9), (8, 8), (8, 8))])
def test_windows_change_nothing_for_a_network_without_context(size, window, stride) -> None:
    image = torch.rand(2, 3, *size)
    torch.testing.assert_close(sliding_window(position_free, image, window, stride), position_free(image))


def test_windows_are_those_of_the_published_evaluation() -> None:
    image = torch.rand(1, 3, 10, 13)
    total, count = torch.zeros(1, 2, 10, 13), torch.zeros(1, 1, 10, 13)
    for top in (0, 4):  # 10 rows: windows at 0 and 4 would end at 10, no third one
        for left in (0, 4, 7):  # 13 columns: 0, 4, and 8 moved back to 7
            total[:, :, top : top + 6, left : left + 6] += local_mean(image[:, :, top : top + 6, left : left + 6])
            count[:, :, top : top + 6, left : left + 6] += 1
    assert count.min() == 1
    torch.testing.assert_close(sliding_window(local_mean, image, (6, 6), (4, 4)), total / count)


@pytest.mark.parametrize("stride", [(9, 4), (0, 4)])
def test_a_stride_that_leaves_gaps_is_refused(stride) -> None:
    with pytest.raises(ValueError, match="must be positive and at most the window"):
        sliding_window(position_free, torch.rand(1, 3, 20, 20), (8, 8), stride)


# Worked out by hand from OpenMMLab's rounding: the sides times the scale are cut, the picture is fitted into that.
SCALED_SIZES = {
    ((12, 18), 1.75): (21, 31),  # fitted into 21×31.5: the long side decides
    ((12, 18), 0.5): (6, 9),
    ((375, 500), 0.75): (281, 375),  # 281.25 is cut
    ((333, 500), 1.25): (416, 625),  # 416.25×625: 416 / 333 decides, 624.6 is rounded
    ((333, 500), 1.75): (582, 874),  # 582.75×875: 582 / 333 decides, 873.87 is rounded
    ((500, 333), 1.75): (874, 582),
    ((3, 600), 0.5): (1, 200),  # fitted into 1×300
    ((1, 7), 0.5): (1, 3),  # never less than a pixel; 3.5 is cut
    ((7, 1), 1.0): (7, 1),
}


@pytest.mark.parametrize(("size", "scale"), SCALED_SIZES)
def test_sizes_are_those_of_the_published_evaluation(size: tuple[int, int], scale: float) -> None:
    assert scaled_size(torch.empty(1, 1, *size), scale) == SCALED_SIZES[size, scale]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_augmentation_is_the_mean_over_scales_and_flips(align_corners: bool, channels: int) -> None:
    def network(image: torch.Tensor) -> torch.Tensor:
        return local_mean(image.mean(1, keepdim=True).expand(-1, 3, -1, -1)) / 10

    image = torch.rand(2, channels, 12, 18)
    copies = [F.interpolate(image, size, mode="bilinear") for size in ((6, 9), (12, 18), (21, 31))]
    expected = []
    for copy in copies:
        for dims in ([], [3]):
            logits = network(copy.flip(dims)).flip(dims)
            upsampled = F.interpolate(logits, (24, 30), mode="bilinear", align_corners=align_corners)
            expected.append(upsampled.softmax(1))
    for scaled in (None, copies):
        other = torch.zeros(2, channels, 40, 40) if scaled else image  # where there are copies, only they count
        actual = augmented_probabilities(network, other, (24, 30), [0.5, 1.0, 1.75], True, align_corners, scaled)
        torch.testing.assert_close(actual, torch.stack(expected).mean(0))
        torch.testing.assert_close(actual.sum(1), torch.ones(2, 24, 30))


def test_copies_of_8_bits_are_pictures_from_0_to_1() -> None:
    image = torch.randint(0, 256, (1, 3, 12, 18), dtype=torch.uint8)
    unit = image / 255
    actual = augmented_probabilities(local_mean, unit, (12, 18), [1.0], scaled=[image])
    assert torch.equal(actual, augmented_probabilities(local_mean, unit, (12, 18)))
    with pytest.raises(ValueError, match="1 scaled copies of the images for 2 scales"):
        augmented_probabilities(local_mean, unit, (12, 18), [0.5, 1.0], scaled=[image])


def test_without_augmentation_it_is_the_softmax() -> None:
    image = torch.rand(1, 3, 12, 18)
    actual = augmented_probabilities(local_mean, image, (12, 18))
    torch.testing.assert_close(actual, local_mean(image).softmax(1))
