"""Draw street scenes with label maps: pictures that need no download and cannot be labelled from local texture alone.

The rule is explained at `SyntheticScenesDataModule`.

Lengths are in picture heights: x runs from 0 to ``width / height``, y from 0 (top) to 1 (bottom). Depth on the ground
is told by ``near``, 0 at the horizon and 1 at the lower edge of the picture.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from lk_backbones.data.classes import ClassTable
from lk_backbones.data.scenes.canvas import (
    BODIES,
    CLOTHES,
    FACADES,
    GREEN_LIGHT,
    GREENS,
    OVERSAMPLING,
    PALETTES,
    RED_LIGHT,
    SKINS,
    Canvas,
    Palette,
    Point,
)

SCENE_CLASSES = ClassTable(
    names=(
        "sky",
        "building",
        "road",
        "sidewalk",
        "tree",
        "person",
        "signal",
        "moving vehicle",
        "stopped vehicle",
    ),
    colors=(
        (115, 185, 235),
        (150, 95, 90),
        (105, 95, 125),
        (225, 170, 200),
        (85, 145, 60),
        (225, 40, 75),
        (250, 220, 60),
        (30, 200, 160),
        (240, 125, 30),
    ),
    class_of_label={index: index for index in range(9)},
)
SKY, BUILDING, ROAD, SIDEWALK, TREE, PERSON, SIGNAL, MOVING_VEHICLE, STOPPED_VEHICLE = range(9)


@dataclass(frozen=True)
class Scene:
    """A drawn street scene.

    Attributes:
        image: uint8 RGB ``(H, W, 3)``.
        mask: uint8 class index ``(H, W)``.
        instances: uint8 ``(H, W)``; 0 where there is no countable object, else 1 + the object's place in ``objects``.
            An object that others hide altogether has no pixel.
        objects: Class index of every person, tree, signal and vehicle, far ones first.
    """

    image: np.ndarray
    mask: np.ndarray
    instances: np.ndarray
    objects: tuple[int, ...]


@dataclass(frozen=True)
class _Street:
    """Where the road lies: straight lanes that meet at the horizon."""

    aspect: float
    horizon: float
    vanishing_x: float
    bottom_x: float
    far_width: float
    near_width: float
    lanes: int

    def y(self, near: float) -> float:
        return self.horizon + (1 - self.horizon) * near

    def width(self, near: float) -> float:
        return self.far_width + (self.near_width - self.far_width) * near

    def x(self, near: float, lane: float) -> float:
        """Return x of a position counted in lanes from the left kerb (0 to ``lanes``)."""
        center = self.vanishing_x + (self.bottom_x - self.vanishing_x) * near
        return center + self.width(near) * (lane / self.lanes - 0.5)

    def lane_width(self, near: float) -> float:
        return self.width(near) / self.lanes


def draw_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Draw one scene.

    Args:
        rng: Source of all chance; the same state gives the same scene.
        height: Height in pixels, at least 64.
        width: Width in pixels, at least the height.

    Returns:
        The scene.

    Raises:
        ValueError: If the size is too small for the signals to be told apart.
    """
    if height < 64 or width < height:
        raise ValueError(f"Scenes must be at least 64 pixels high and no narrower than high, got {height}×{width}.")
    canvas = Canvas(height, width)
    palette = PALETTES[rng.integers(len(PALETTES))]
    aspect = width / height
    horizon = rng.uniform(0.38, 0.46)
    street = _Street(
        aspect=aspect,
        horizon=horizon,
        vanishing_x=aspect * rng.uniform(0.46, 0.54),
        bottom_x=aspect * rng.uniform(0.46, 0.54),
        far_width=aspect * rng.uniform(0.46, 0.56),
        near_width=aspect * rng.uniform(0.88, 1.0),
        lanes=4 if rng.random() < 0.7 else 2,
    )
    # As many green signals as red ones in every scene: counting them tells nothing about any one vehicle.
    is_green = rng.permutation(np.arange(street.lanes) % 2 == 0)

    _draw_sky(canvas, rng, palette, street)
    canvas.light = np.asarray(palette.light)
    _draw_buildings(canvas, rng, palette, street)
    _draw_ground(canvas, rng, street)
    _draw_trees(canvas, rng, street)
    _draw_gantry(canvas, rng, street, is_green)
    _draw_people_and_vehicles(canvas, rng, street, is_green)

    image = cv2.resize(canvas.image, (width, height), interpolation=cv2.INTER_AREA)
    codes = canvas.codes[::OVERSAMPLING, ::OVERSAMPLING]
    return Scene(
        image=_add_noise(image, rng),
        mask=(codes & 255).astype(np.uint8),
        instances=(codes >> 8).astype(np.uint8),
        objects=tuple(canvas.objects),
    )


def _draw_sky(canvas: Canvas, rng: np.random.Generator, palette: Palette, street: _Street) -> None:
    rows = round(canvas.height * (street.horizon + 0.05))
    share = np.linspace(0, 1, rows)[:, None, None]
    canvas.image[:rows] = (1 - share) * palette.zenith + share * palette.horizon
    for _ in range(rng.integers(1, 5)):
        x, y, size = rng.uniform(0, street.aspect), rng.uniform(0.02, 0.22), rng.uniform(0.03, 0.06)
        for _ in range(4):
            shift, puff = rng.uniform(-1.6, 1.6) * size, rng.uniform(0.5, 1.0) * size
            canvas.ellipse((x + shift, y), (1.5 * puff, 0.6 * puff), palette.cloud)


def _draw_buildings(canvas: Canvas, rng: np.random.Generator, palette: Palette, street: _Street) -> None:
    base = street.horizon + 0.06
    x = -0.02  # a hazy row far away
    while x < street.aspect:
        width = rng.uniform(0.05, 0.14)
        haze = 0.55 * np.asarray(FACADES[rng.integers(len(FACADES))]) + 0.45 * np.asarray(palette.horizon)
        canvas.box(x, base - rng.uniform(0.10, 0.22), x + width, base, canvas.color(haze), BUILDING)
        x += width
    for side in (0, 1):
        x = -rng.uniform(0, 0.1)
        while x < 0.30 * street.aspect:
            width = rng.uniform(0.14, 0.26)
            left = x if side == 0 else street.aspect - x - width
            # Higher towards the edges of the picture, as they are nearer there.
            top = base - rng.uniform(0.20, 0.34) - 0.30 * max(0.0, 0.25 - x / street.aspect)
            _draw_facade(canvas, rng, palette, left, top, left + width, base)
            x += width


def _draw_facade(
    canvas: Canvas, rng: np.random.Generator, palette: Palette, left: float, top: float, right: float, bottom: float
) -> None:
    facade = FACADES[rng.integers(len(FACADES))]
    canvas.box(left, top, right, bottom, canvas.color(facade), BUILDING)
    canvas.box(left, top, right, top + 0.012, canvas.color(facade, 0.7), BUILDING)
    if rng.random() < 0.4:
        middle = (left + right) / 2
        peak = [(left, top), (middle, top - rng.uniform(0.03, 0.07)), (right, top)]
        canvas.polygon(peak, canvas.color((140, 72, 58), rng.uniform(0.8, 1.1)), BUILDING)
    columns, step = rng.integers(3, 6), rng.uniform(0.05, 0.07)
    pitch = (right - left) / columns
    dark = canvas.color(palette.window, 0.9)
    for y in np.arange(top + 0.03, bottom - 0.07, step):
        for column in range(columns):
            x = left + (column + 0.25) * pitch
            canvas.box(x, y, x + 0.5 * pitch, y + 0.55 * step, dark if rng.random() < 0.8 else (246, 226, 160))
    awning = CLOTHES[rng.integers(len(CLOTHES))]
    canvas.box(left + 0.1 * pitch, bottom - 0.055, right - 0.1 * pitch, bottom - 0.035, canvas.color(awning))
    canvas.box(left + 0.3 * pitch, bottom - 0.035, right - 0.3 * pitch, bottom, canvas.color((70, 62, 60)))


def _draw_ground(canvas: Canvas, rng: np.random.Generator, street: _Street) -> None:
    paving = canvas.color((186, 178, 168), rng.uniform(0.9, 1.08))
    top = street.horizon + 0.055
    canvas.box(0, top, street.aspect, 1.0, paving, SIDEWALK)
    seam = canvas.color((186, 178, 168), 0.86)
    for near in (0.13, 0.22, 0.34, 0.49, 0.67, 0.88):
        canvas.box(0, street.y(near), street.aspect, street.y(near) + 0.004 + 0.006 * near, seam)

    far = (top - street.horizon) / (1 - street.horizon)
    lanes = street.lanes
    edge = 0.12 * lanes / 4

    def stripe(first: float, last: float, begin: float = far, end: float = 1.0) -> list[Point]:
        return [
            (street.x(begin, first), street.y(begin)),
            (street.x(begin, last), street.y(begin)),
            (street.x(end, last), street.y(end)),
            (street.x(end, first), street.y(end)),
        ]

    canvas.polygon(stripe(-edge, lanes + edge), canvas.color((206, 202, 196)), SIDEWALK)  # kerb stones
    canvas.polygon(stripe(0, lanes), canvas.color((98, 98, 104), rng.uniform(0.85, 1.1)), ROAD)
    white = canvas.color((226, 226, 220))
    for lane in range(1, lanes):
        phase = rng.uniform(0.0, 0.4)
        for number in range(8):  # dashes of equal length on the ground shorten towards the horizon
            begin, end = 1 / (1 + 0.42 * (number + phase)), 1 / (1 + 0.42 * (number + phase + 0.5))
            if end > far:
                thin = 0.035 * lanes / 4
                canvas.polygon(stripe(lane - thin, lane + thin, end, begin), white)


def _draw_trees(canvas: Canvas, rng: np.random.Generator, street: _Street) -> None:
    # Crowns stay clear of the signals, which hang above the middle of the road.
    places = [(rng.uniform(0.10, 0.30), side) for side in (-1, 1) for _ in range(rng.integers(0, 3))]
    for near, side in sorted(places):
        kerb = street.x(near, 0 if side < 0 else street.lanes)
        x = kerb + side * rng.uniform(0.08, 0.24)
        y, size = street.y(near), 0.10 + 0.16 * near + rng.uniform(0.0, 0.02)
        code = canvas.add_object(TREE)
        trunk = canvas.color((104, 78, 58))
        canvas.polygon(
            [(x - 0.09 * size, y), (x - 0.06 * size, y - size), (x + 0.06 * size, y - size), (x + 0.09 * size, y)],
            trunk,
            code,
        )
        green = GREENS[rng.integers(len(GREENS))]
        for number in range(7):
            spread = 0.45 * size
            center = (x + rng.uniform(-1, 1) * spread, y - 1.25 * size + rng.uniform(-1, 1) * spread)
            radius = rng.uniform(0.38, 0.5) * size
            canvas.ellipse(center, (radius, radius), canvas.color(green, 0.78 + 0.06 * number), code)


def _draw_gantry(canvas: Canvas, rng: np.random.Generator, street: _Street, is_green: np.ndarray) -> None:
    near = rng.uniform(0.34, 0.42)  # where its posts stand
    beam, foot = rng.uniform(0.10, 0.15), street.y(near)
    metal, shade = canvas.color((120, 126, 134)), canvas.color((84, 90, 98))
    left, right = street.x(near, -0.35), street.x(near, street.lanes + 0.35)
    for x in (left, right):  # the frame is labelled as signal too, but is none to be counted
        canvas.box(x - 0.009, beam, x + 0.009, foot, shade, SIGNAL)
    canvas.box(left - 0.02, beam - 0.014, right + 0.02, beam + 0.014, metal, SIGNAL)
    canvas.box(left - 0.02, beam + 0.006, right + 0.02, beam + 0.014, shade, SIGNAL)
    half = min(0.060, 0.36 * street.lane_width(near))
    for lane, green in enumerate(is_green):
        x, y = street.x(near, lane + 0.5), beam + 0.014 + half
        code = canvas.add_object(SIGNAL)
        canvas.box(x - half, y - half, x + half, y + half, (26, 28, 32), code)
        size = 0.68 * half
        if green:  # an arrow downwards
            canvas.box(x - 0.28 * size, y - size, x + 0.28 * size, y + 0.2 * size, GREEN_LIGHT)
            canvas.polygon([(x - size, y), (x + size, y), (x, y + size)], GREEN_LIGHT)
        else:  # a cross
            arm = 0.32 * size
            for way in (-1, 1):
                ends = [(-size, -size + arm), (-size + arm, -size), (size, size - arm), (size - arm, size)]
                canvas.polygon([(x + way * dx, y + dy) for dx, dy in ends], RED_LIGHT)


def _draw_people_and_vehicles(canvas: Canvas, rng: np.random.Generator, street: _Street, is_green: np.ndarray) -> None:
    """Draw far ones first. A vehicle is drawn in the same way whatever its signal shows: only the label differs."""
    vehicles: list[tuple[float, int]] = []
    for lane in range(street.lanes):
        first = rng.uniform(0.58, 0.98)
        if rng.random() < 0.95:
            vehicles.append((first, lane))
        if first > 0.8 and rng.random() < 0.7:
            vehicles.append((rng.uniform(0.44, 0.56), lane))
    people = [(rng.uniform(0.25, 0.98), -1 - side) for side in (0, 1) for _ in range(rng.integers(0, 4))]
    for near, lane in sorted(vehicles + people):
        if lane < 0:
            kerb, side = (street.x(near, 0), -1) if lane == -1 else (street.x(near, street.lanes), 1)
            room = kerb if side < 0 else street.aspect - kerb
            x = kerb + side * max(rng.uniform(0.2, 0.9) * room, 0.05)
            _draw_person(canvas, rng, x, street.y(near), 0.10 + 0.16 * near)
        else:
            code = canvas.add_object(MOVING_VEHICLE if is_green[lane] else STOPPED_VEHICLE)
            x = street.x(near, lane + 0.5 + rng.uniform(-0.05, 0.05))
            size = min(0.76 * street.lane_width(near), 0.20 + 0.16 * near)
            _draw_vehicle(canvas, rng, x, street.y(near), size, code)


def _draw_person(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    code = canvas.add_object(PERSON)
    coat = canvas.color(CLOTHES[rng.integers(len(CLOTHES))])
    legs = canvas.color((52, 54, 70), rng.uniform(0.8, 1.6))
    skin = canvas.color(SKINS[rng.integers(len(SKINS))])
    stride = rng.uniform(0.02, 0.10) * size
    canvas.ellipse((x, y), (0.2 * size, 0.04 * size), canvas.color((120, 114, 108)))
    for step in (-stride, stride):
        hip, foot = x + 0.4 * step, x + step
        corners = [(hip - 0.06 * size, y - 0.5 * size), (hip + 0.06 * size, y - 0.5 * size)]
        canvas.polygon([*corners, (foot + 0.05 * size, y), (foot - 0.05 * size, y)], legs, code)
    shoulder, waist, chest = 0.13 * size, 0.10 * size, y - 0.82 * size
    canvas.polygon(
        [(x - shoulder, chest), (x + shoulder, chest), (x + waist, y - 0.42 * size), (x - waist, y - 0.42 * size)],
        coat,
        code,
    )
    canvas.ellipse((x, y - 0.90 * size), (0.085 * size, 0.1 * size), skin, code)
    hair = canvas.color((70, 50, 40), rng.uniform(0.4, 1.8))
    canvas.ellipse((x, y - 0.92 * size), (0.09 * size, 0.09 * size), hair, code, upper_half=True)


def _draw_vehicle(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float, code: int) -> None:
    """Draw a car or a van from behind: ``size`` wide, its wheels at ``y``."""
    body = BODIES[rng.integers(len(BODIES))]
    half = size / 2
    is_van = rng.random() < 0.35
    tall = size * (rng.uniform(0.95, 1.1) if is_van else rng.uniform(0.72, 0.82))
    waist, roof = y - 0.52 * tall, y - tall
    narrow = half * (0.94 if is_van else 0.72)
    paint, shade, glass = canvas.color(body), canvas.color(body, 0.78), canvas.color((62, 80, 96))
    canvas.ellipse((x, y), (1.12 * half, 0.07 * size), canvas.color((52, 52, 58)))  # its shadow belongs to the road
    for side in (-1, 1):
        wheel = x + side * 0.7 * half
        canvas.box(wheel - 0.14 * half, y - 0.16 * tall, wheel + 0.14 * half, y + 0.01, (28, 28, 32), code)
    cabin = [(x - 0.96 * half, waist), (x - narrow, roof), (x + narrow, roof), (x + 0.96 * half, waist)]
    canvas.polygon(cabin, paint, code)
    pane = 0.86 * narrow
    window = [
        (x - 0.84 * half, waist - 0.02 * tall),
        (x - pane, roof + 0.08 * tall),
        (x + pane, roof + 0.08 * tall),
        (x + 0.84 * half, waist - 0.02 * tall),
    ]
    canvas.polygon(window, glass)
    gleam = [(x - 0.2 * half, waist - 0.02 * tall), (x + 0.1 * half, roof + 0.08 * tall)]
    canvas.polygon(
        [*gleam, (x + 0.3 * half, roof + 0.08 * tall), (x, waist - 0.02 * tall)], canvas.color((104, 126, 144))
    )
    canvas.box(x - half, waist, x + half, y - 0.10 * tall, paint, code)
    canvas.box(x - half, y - 0.24 * tall, x + half, y - 0.10 * tall, shade, code)
    for side in (-1, 1):
        lamp = x + side * 0.84 * half
        canvas.box(lamp - 0.14 * half, waist + 0.05 * tall, lamp + 0.14 * half, waist + 0.17 * tall, (188, 30, 34))
    canvas.box(x - 0.24 * half, y - 0.22 * tall, x + 0.24 * half, y - 0.14 * tall, (236, 232, 210))


@lru_cache(maxsize=1)
def _noise_tile() -> np.ndarray:
    """Return grain to cut from: drawing it afresh for each picture would take as long as all the rest."""
    rng = np.random.default_rng(0)
    fine = rng.normal(0, 4, (512, 512, 1))
    coarse = cv2.resize(rng.normal(0, 4, (128, 128)), (512, 512), interpolation=cv2.INTER_LINEAR)[..., None]
    return np.repeat((fine + coarse).round(), 3, axis=2).astype(np.int16)


def _add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tile = _noise_tile()
    top, left = rng.integers(tile.shape[0]), rng.integers(tile.shape[1])
    grain = np.take(tile, np.arange(top, top + image.shape[0]), axis=0, mode="wrap")
    grain = np.take(grain, np.arange(left, left + image.shape[1]), axis=1, mode="wrap")
    return np.clip(image + grain, 0, 255).astype(np.uint8)
