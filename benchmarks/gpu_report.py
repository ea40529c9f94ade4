"""What ``gpu.py`` makes of its figures: what was asked for and what came out, tables, plots."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpu_operator import PYTORCH

from lk_backbones._files import write_atomically

KIND_NAMES = {"forward": "forward", "input_gradient": "input gradient", "weight_gradient": "weight gradient"}
DASH = "–"
ONE_KERNEL = ("native", "cudnn", "aten")  # paths that are the same wherever PyTorch does not ask which library to use


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, or a dash."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def median(entry: dict[str, Any] | None) -> float | None:
    """Return milliseconds of the device, the median, if there are any."""
    return None if entry is None else entry.get("device_ms_median")


def fastest(paths: dict[str, dict[str, Any]], wanted: Callable[[str], bool] = lambda path: True) -> tuple[str, float]:
    """Return the fastest of some paths and its milliseconds; no name and infinity if there is none."""
    times = {path: entry["device_ms_median"] for path, entry in paths.items() if wanted(path)}
    path = min(times, key=times.__getitem__, default="")
    return path, times.get(path, math.inf)


def pytorch(result: dict[str, Any]) -> tuple[str, float]:
    """Return the fastest of PyTorch's own operator, in either format and by either library."""
    return fastest(result["paths"], PYTORCH.__contains__)


def is_one_kernel(result: dict[str, Any]) -> bool:
    """Return whether PyTorch's operator takes as long whichever library it is told to use, as where it does not ask."""
    times = [median(result["paths"].get(path)) for path in ONE_KERNEL]
    known = [time for time in times if time is not None]
    return len(known) == len(ONE_KERNEL) and max(known) <= 1.03 * min(known)


def chosen_ms(result: dict[str, Any]) -> float | None:
    """Return milliseconds of the path that the operator chooses; of the operator itself if that path was not timed."""
    return median(result["paths"].get(result.get("chosen", ""))) or median(result.get("ours"))


def rows(content: dict[str, Any], **wanted: Any) -> Iterator[dict[str, Any]]:
    """Yield measured settings whose entries have these values."""
    for row in content["operator"]:
        if all(row[key] == value for key, value in wanted.items()):
            yield row


def results(content: dict[str, Any], **wanted: Any) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Yield settings with each of their results that could be timed."""
    for row in rows(content, **wanted):
        for kind, result in row["results"].items():
            if result["paths"]:
                yield row, kind, result


# -------------------------------------------------------------------------------------------------------------- targets


def targets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Say what was asked for, what was measured, and whether that is met; ``None`` where nothing was measured."""
    found: list[dict[str, Any]] = []

    def add(asked: str, measured: str | None, met: bool | None) -> None:
        found.append({"asked": asked, "measured": measured or "not measured", "met": met if measured else None})

    _add_regret(content, add)
    large = [
        (row, kind, result)
        for row, kind, result in results(content)
        if row["height"] == row["width"] and row["height"] in (28, 56) and min(_kernel(row)) >= 21
        if row["dtype"] in ("bfloat16", "float16") and row["batch"] >= 8
    ]
    for kind, name in KIND_NAMES.items():
        ratios = {
            row["label"]: pytorch(result)[1] / (chosen_ms(result) or math.nan)
            for row, own, result in large
            if own == kind
        }
        _add_least(add, f"{name}, k ≥ 21 at 56×56 and 28×28, half precision: ≥ 3 × PyTorch's best", ratios, 3.0)
    for kind, name in KIND_NAMES.items():
        ratios = {
            row["label"]: fastest(result["paths"], "fft".__eq__)[1] / (chosen_ms(result) or math.nan)
            for row, own, result in large
            if own == kind and _kernel(row) == (31, 31)
        }
        _add_least(add, f"{name}, 31×31 at 56×56 and 28×28, half precision: ≥ 1.5 × fft", ratios, 1.5)
    first = _only(content, 64, 128, 56, 31)
    for kind in ("forward",):
        ms = chosen_ms(first[kind]) if first and kind in first else None
        text = None if ms is None else f"{number(ms)} ms by {first[kind]['chosen']}"
        add(
            "stage 1 forward (64×128×56×56, 31×31, bfloat16): ≤ 0.36 ms on an H200", text, ms is not None and ms <= 0.36
        )
    for stage, shape in ((1, (64, 128, 56, 31)), (2, (64, 256, 28, 29))):
        own = _only(content, *shape)
        for kind, allowed in (("forward", 2.5), ("input_gradient", 2.5), ("weight_gradient", 3.5)):
            ms = chosen_ms(own[kind]) if own and kind in own else None
            bound = own[kind].get("toeplitz_ms") if own and kind in own else None
            ratio = ms / bound if ms and bound else None
            text = None if ratio is None else f"{number(ratio)} ({number(ms)} ms over {number(bound)} ms)"
            asked = f"stage {stage} {KIND_NAMES[kind]}: ≤ {allowed} × the Toeplitz roofline"
            add(asked, text, ratio is not None and ratio <= allowed)
    large_kernel = _only(content, 64, 128, 56, 51)
    for kind, name in KIND_NAMES.items():
        pair = [chosen_ms(own[kind]) if own and kind in own else None for own in (large_kernel, first)]
        ratio = pair[0] / pair[1] if pair[0] and pair[1] else None
        text = None if ratio is None else f"{number(ratio)} ({number(pair[0])} over {number(pair[1])} ms)"
        add(f"{name} 51×51 over 31×31 at 56×56: ≤ 1.8", text, ratio is not None and ratio <= 1.8)
    _add_training(content, add)
    tuning = content["tuning"].get("nothing known")
    seconds = None if not tuning else tuning.get("tuning_seconds")
    text = None if seconds is None else f"{number(seconds)} s for {tuning['measured_classes']} results"
    add("tuning RepLKNet-31B from an empty cache: ≤ 20 s", text, seconds is not None and seconds <= 20)
    added = content["look_up"].get("added_microseconds")
    whole = content["look_up"].get("look_up_microseconds")
    text = None if added is None else f"{number(added)} µs ({number(whole)} µs with what any choice takes)"
    add("a look-up adds to a call: ≤ 3 µs", text, added is not None and added <= 3)
    return found


def _kernel(row: dict[str, Any]) -> tuple[int, int]:
    return row["kernel_height"], row["kernel_width"]


def _only(content: dict[str, Any], batch: int, channels: int, size: int, kernel: int) -> dict[str, Any] | None:
    wanted = {"batch": batch, "channels": channels, "height": size, "width": size, "kernel_height": kernel}
    found = rows(content, **wanted, kernel_width=kernel, dtype="bfloat16", layout="contiguous")
    row = next(found, None)
    return None if row is None else {kind: own for kind, own in row["results"].items() if own["paths"]}


def _add_least(
    add: Callable[[str, str | None, bool | None], None], asked: str, ratios: dict[str, float], wanted: float
) -> None:
    known = {label: ratio for label, ratio in ratios.items() if math.isfinite(ratio)}
    if not known:
        add(asked, None, None)
        return
    label = min(known, key=known.__getitem__)
    add(asked, f"at least {number(known[label])} of {len(known)} shapes ({label})", known[label] >= wanted)


def _add_regret(content: dict[str, Any], add: Callable[[str, str | None, bool | None], None]) -> None:
    """How much slower the chosen path is than any that the tuner had a choice of, as programs call them.

    The fastest of many medians is fast by luck, too: slower is what is slower at its best as well.
    """
    asked = "after tuning never slower than the best candidate by more than 5 %, in median and best"
    ratios: dict[str, float] = {}
    for row, kind, result in results(content):
        own = result["paths"].get(result["chosen"])
        others = [result["paths"][path] for path in result["tuned_among"] if path in result["paths"]]
        if own is None or not others:
            continue
        ratios[f"{row['label']} {KIND_NAMES[kind]}, {result['chosen']}"] = max(
            min(own[name] / other[name] for name in ("called_ms_median", "called_ms_best")) for other in others
        )
    if not ratios:
        add(asked, None, None)
        return
    worst = max(ratios, key=ratios.__getitem__)
    missed = sum(ratio > 1.05 for ratio in ratios.values())
    text = f"{missed} of {len(ratios)} results beyond 5 %; worst {number(ratios[worst])} × ({worst})"
    add(asked, text, missed == 0)


def _add_training(content: dict[str, Any], add: Callable[[str, str | None, bool | None], None]) -> None:
    groups = [own for own in content["models"] if own["kind"] == "training" and own["size"] == 224]
    for name, label in (("swin_base_patch4_window7_224", "Swin-B"), ("convnext_base", "ConvNeXt-B")):
        asked = f"RepLKNet-31B trains at 224 px, images/s beside {label}"
        text = None
        for group in groups:
            if group["compiled"]:
                continue
            ours, other = (_best_rate(group, model) for model in ("replknet_31b", name))
            if ours and other:
                text = f"{number(ours)} beside {number(other)}: {number(ours / other)} ×"
                break
        add(asked, text, None)


def _best_rate(group: dict[str, Any], model: str) -> float | None:
    """Images/s of a model in its faster memory format, by the path that users get."""
    rates = [
        entry["images_per_second"]
        for label, entry in group["models"].items()
        if label.split(", ")[0] == model and "images_per_second" in entry and "PyTorch" not in label
    ]
    return max(rates, default=None)


# --------------------------------------------------------------------------------------------------------------- tables


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    """Return lines of a Markdown table."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in body), ""]


def target_lines(content: dict[str, Any]) -> list[str]:
    """Return a table of `targets`."""
    words = {True: "yes", False: "**no**", None: DASH}
    return table(
        ("asked for", "measured", "met"),
        ([own["asked"], own["measured"], words[own["met"]]] for own in content["targets"]),
    )


def markdown(content: dict[str, Any]) -> str:
    """Return everything as tables."""
    machine = content["machine"]
    lines = [f"# Benchmark on {machine['card']}", ""]
    if content["pretended"]:
        lines += ["**Pretended: tiny shapes on a CPU. No figure here tells anything about a GPU.**", ""]
    facts = ("compute_capability", "driver_version", "torch", "triton", "cuda", "cudnn", "timm", "processors")
    lines += [", ".join(f"{fact} {machine[fact]}" for fact in facts if fact in machine) + f"; {content['date']}.", ""]
    lines += ["Reached by this card: " + rates_line(content["rates"]) + ". These are the roofline below.", ""]
    if content["condition"]:
        lines += [condition_line(content["condition"]), ""]
    lines += ["## Asked for and measured", "", *target_lines(content)]
    lines += ["## What was done", ""]
    lines += table(
        ("section", "state", "seconds", "left out"),
        (
            [name, own["state"], number(own["seconds"]), str(len(own["left_out"])) if own["left_out"] else DASH]
            for name, own in content["sections"].items()
        ),
    )
    for title, body in (
        ("Operator", _operator_lines),
        ("Cuts of Triton's products", _config_lines),
        ("Which path was fastest, how often", _fastest_lines),
        ("Errors against float64", _error_lines),
        ("Models", _model_lines),
        ("Tuning and looking up", _tuning_lines),
        ("Failures", _failure_lines),
    ):
        lines += [f"## {title}", "", *(body(content) or ["Nothing was measured.", ""])]
    return "\n".join(lines)


def rates_line(rates: dict[str, Any]) -> str:
    """Return what the card reached in words."""
    if not rates:
        return "not measured"
    parts = []
    for name, rate in rates.items():
        unit = "GB/s copied" if name == "copy_gb_per_second" else f"TFLOP/s {name}"
        parts.append(f"{number(rate)} {unit}" if isinstance(rate, float) else f"{name}: {rate}")
    return ", ".join(parts)


# Bits of clocks_event_reasons.active that mean less than full speed under load.
SLOWED_BY = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def condition_line(condition: dict[str, dict[str, Any]]) -> str:
    """Return in words how the card was under load, at the beginning and at the end."""
    parts = []
    for when, own in condition.items():
        rate = own.get("bfloat16")
        facts = [own["failed"] if rate is None else f"{number(rate)} TFLOP/s bfloat16"]
        facts += [f"{name} {own[name]}" for name in ("clocks.sm", "temperature.gpu", "power.draw") if name in own]
        try:
            reasons = int(own["clocks_event_reasons.active"], 16)
        except (KeyError, ValueError):
            facts.append("whether it was slowed down is unknown")
        else:
            names = [name for bit, name in SLOWED_BY.items() if reasons & bit]
            facts.append(f"slowed down by {', '.join(names)}" if names else "not slowed down")
        parts.append(f"at the {when} {', '.join(facts)}")
    return f"Under load: {'; '.join(parts)}."


def _operator_lines(content: dict[str, Any]) -> list[str]:
    lines = [
        "Milliseconds of the device, medians. PyTorch: the fastest of its own operator in either memory format and by "
        "either library, conversions included; the path in brackets. ×: that over ours. Called: as programs call it, "
        "Python included. TFLOP/s count taps inside the map only. Roofline: what copying the maps takes, or the fewest "
        "operations (on tensor cores as a block-Toeplitz product, or tap by tap in float32), whichever is longer, over "
        "ours; an fft can pass it. Maps that fit into the card's cache can pass the memory's. "
        f"¹ {', '.join(ONE_KERNEL)} agree within 3 %: PyTorch asks which library to use for contiguous float16 of 32 "
        "channels or more only, and computes all three by one kernel elsewhere.",
        "",
    ]
    body = []
    for row, kind, result in results(content):
        ours, (path, theirs) = chosen_ms(result), pytorch(result)
        fft = fastest(result["paths"], "fft".__eq__)[1]
        own = result["paths"].get(result["chosen"]) or result["ours"] or {}
        share = own.get("share_of_roofline")
        body.append(
            [
                row["group"],
                row["label"],
                KIND_NAMES[kind],
                f"{number(ours)} ({result['chosen']})",
                f"{number(theirs)} ({path}{'¹' if path in ONE_KERNEL and is_one_kernel(result) else ''})"
                if path
                else DASH,
                f"**{number(theirs / ours)}**" if path and ours else DASH,
                number(fft),
                number((result["ours"] or {}).get("called_ms_median")),
                number(own.get("tflops")),
                DASH if share is None else f"{number(100 * share, 2)} %",
            ]
        )
    head = ("group", "shape", "result", "ours", "PyTorch", "×", "fft", "called", "TFLOP/s", "roofline")
    return [*lines, *table(head, body)] if body else []


def _config_lines(content: dict[str, Any]) -> list[str]:
    taken = [(row, kind, result) for row, kind, result in results(content)]
    names = sorted({path for _, _, own in taken for path in own["paths"] if path.startswith("triton")})
    if not names:
        return []
    body = []
    for row, kind, result in taken:
        cells = [number(median(result["paths"].get(name))) for name in names]
        if any(cell != DASH for cell in cells):
            best = result["toeplitz_ms"]
            body.append([row["label"], KIND_NAMES[kind], *cells, number(best)])
    lines = [
        "Milliseconds of the device. Toeplitz: the least that a block-Toeplitz product takes at the card's own rates, "
        "or copying its maps, whichever is longer.",
        "",
        *table(("shape", "result", *names, "Toeplitz"), body),
    ]
    kernels = sorted(
        {
            (path, kernel["kernel"], kernel["registers"], kernel["spills"], kernel["shared_bytes"])
            for _, _, result in taken
            for path, entry in result["paths"].items()
            for kernel in entry.get("kernels", ())
        },
        key=str,
    )
    if kernels:
        lines += ["What the compiler made of them, one line for each that differs:", ""]
        head = ("path", "kernel", "registers", "spilled values", "bytes of shared memory")
        lines += table(head, ([str(part) for part in kernel] for kernel in kernels))
    return lines


def _fastest_lines(content: dict[str, Any]) -> list[str]:
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    for row, kind, result in results(content):
        if min(_kernel(row)) >= 7:
            own = counts.setdefault((row["dtype"], row["layout"], KIND_NAMES[kind]), {})
            path = fastest(result["paths"])[0]
            if path in ONE_KERNEL and is_one_kernel(result):
                path = "native"
            own[path] = own.get(path, 0) + 1
    body = []
    for key, own in counts.items():
        ordered = sorted(own.items(), key=lambda item: -item[1])
        body.append([*key, ", ".join(f"{path} {count}" for path, count in ordered)])
    note = f"Of kernels of 7×7 and above. Where {', '.join(ONE_KERNEL)} agree within 3 %, they count as native."
    return [note, "", *table(("type", "layout", "result", "fastest"), body)] if body else []


def _error_lines(content: dict[str, Any]) -> list[str]:
    worst: dict[tuple[str, str, str], tuple[float, str, int]] = {}
    for row, kind, result in results(content):
        for path, entry in result["paths"].items():
            if entry.get("error") is not None:
                key = row["dtype"], KIND_NAMES[kind], path
                error, label, count = worst.get(key, (-1.0, "", 0))
                new = (entry["error"], row["label"]) if entry["error"] > error else (error, label)
                worst[key] = (*new, count + 1)
    if not worst:
        return []
    body = ([*key, f"{error:.1e}", str(count), label] for key, (error, label, count) in sorted(worst.items()))
    note = "Relative L2 error on fresh normal numbers, of the operands as rounded to the type; the worst of all shapes."
    return [note, "", *table(("type", "result", "path", "error", "shapes", "worst at"), body)]


def _model_lines(content: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for group in content["models"]:
        lines += [f"{group['kind'].capitalize()}, {group['size']} px, batch {group['batch']}, {group['dtype']}:", ""]
        body = []
        for label, entry in group["models"].items():
            if "images_per_second" not in entry:
                body.append([label, entry.get("failed", DASH), DASH, DASH, DASH])
                continue
            body.append(
                [
                    label,
                    number(entry["images_per_second"], 4),
                    f"{number(entry['ms_median'])} ({number(entry['ms_best'])})",
                    number(entry.get("peak_memory_mb"), 4),
                    number(entry["seconds_until_warm"]),
                ]
            )
        lines += table(("model", "images/s", "ms, median (best)", "peak memory, MB", "s until warm"), body)
    if lines:
        note = (
            "Training: forward and backward, no optimiser, under autocast. Inference: weights in the type, our models "
            "folded. Memory: parameters, gradients and everything else that PyTorch held for this model at once."
        )
        lines = [note, "", *lines]
    return lines


def _tuning_lines(content: dict[str, Any]) -> list[str]:
    body = []
    for name, own in content["tuning"].items():
        if "tuning_seconds" not in own:
            body.append([name, own.get("failed", DASH), DASH, DASH])
            continue
        steps = ", ".join(number(step) for step in own["step_seconds"])
        body.append([name, number(own["tuning_seconds"]), str(own["measured_classes"]), steps])
    lines = table(("RepLKNet-31B, training step", "tuning, s", "results measured", "steps, s"), body) if body else []
    if content["look_up"].get("microseconds_median"):
        best = content["look_up"]["microseconds_best"]
        rows = (
            [name, number(own), number(best[name])] for name, own in content["look_up"]["microseconds_median"].items()
        )
        lines += table(("Python's time on a tiny map", "µs, median", "best"), rows)
    elif content["look_up"].get("failed"):
        lines += [f"Look-up: {content['look_up']['failed']}", ""]
    return lines


def _failure_lines(content: dict[str, Any]) -> list[str]:
    counted: dict[tuple[str, str], list[str]] = {}
    for row in content["operator"]:
        for kind, result in row["results"].items():
            for path, text in result["failed"].items():
                counted.setdefault((path, text), []).append(f"{row['label']} {KIND_NAMES[kind]}")
    lines = [
        f"- {path}: {text} ({labels[0]}{f' and {len(labels) - 1} more' if len(labels) > 1 else ''})"
        for (path, text), labels in counted.items()
    ]
    lines += [f"- {own['where']}: {own['what']}" for own in content["failures"]]
    for name, own in content["sections"].items():
        if own["left_out"]:
            lines.append(f"- {name}, left out: {'; '.join(own['left_out'])}")
    return [*lines, ""] if lines else ["None.", ""]


# ---------------------------------------------------------------------------------------------------------------- plots


def plots(content: dict[str, Any], stem: Path) -> list[Path]:
    """Draw what there is to draw; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        return []
    drawn = []
    for name, draw in (("operator", _plot_kernels), ("roofline", _plot_roofline), ("models", _plot_models)):
        figure = draw(content)
        if figure is None:
            continue
        import matplotlib.pyplot as plt

        path = stem.with_name(f"{stem.name}_{name}.png")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format="png")
        plt.close(figure)
        with write_atomically(path) as file:
            file.write(picture.getvalue())
        drawn.append(path)
    return drawn


COLORS = ("#4477aa", "#cc6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def _title(content: dict[str, Any], text: str) -> str:
    note = "PRETENDED, on a CPU: tells nothing. " if content["pretended"] else ""
    return f"{note}{text} ({content['machine']['card']})"


def _plot_kernels(content: dict[str, Any]) -> Any:
    """Speed-up over PyTorch's operator as it is, by kernel size: a row per type, a column per result."""
    import matplotlib.pyplot as plt

    found = list(results(content, group="paper"))
    if not found:
        return None
    dtypes = list(dict.fromkeys(row["dtype"] for row, _, _ in found))
    size = (12, 2.9 * len(dtypes) + 1.2)
    figure, panels = plt.subplots(len(dtypes), 3, figsize=size, squeeze=False, sharex=True, layout="constrained")
    for row_of_panels, dtype in zip(panels, dtypes, strict=True):
        for axes, kind in zip(row_of_panels, KIND_NAMES, strict=True):
            own = [(row, result) for row, other, result in found if other == kind and row["dtype"] == dtype]
            for color, map_size in zip(COLORS, sorted({row["height"] for row, _ in own}), strict=False):
                for style, label, theirs in (
                    ("o-", f"{map_size}×{map_size}", lambda result: median(result["paths"].get("native"))),
                    (":", None, lambda result: pytorch(result)[1]),
                ):
                    points = sorted(
                        (row["kernel_width"], other / ours)
                        for row, result in own
                        if row["height"] == map_size and (other := theirs(result)) and (ours := chosen_ms(result))
                    )
                    if points:
                        axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
            axes.axhline(1, color="black", linewidth=0.8)
            _label_ratios(axes)
            axes.grid(alpha=0.3)
            axes.set_title(f"{KIND_NAMES[kind]}, {dtype}", fontsize=10)
            axes.set_xticks(sorted({row["kernel_width"] for row, _, _ in found}))
    for axes in panels[-1]:
        axes.set_xlabel("kernel size")
    for row_of_panels in panels:
        row_of_panels[0].set_ylabel("times faster")
    panels[0][0].legend(title="map", fontsize=8, title_fontsize=8)
    batch, channels = found[0][0]["batch"], found[0][0]["channels"]
    text = f"Times faster than F.conv2d as it is; dotted: than the best of PyTorch.\nBatch {batch}, {channels} channels"
    figure.suptitle(_title(content, text), fontsize=11)
    return figure


def _label_ratios(axes: Any) -> None:
    """Logarithmic, with ticks at round numbers, at least from 0.8 to 2."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low, high = min(low, 0.8), max(high, 2.0)
    steps = [scale * step for scale in (0.01, 0.1, 1, 10, 100, 1000) for step in (1, 2, 5)]
    ticks = [step for step in steps if low <= step <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def _plot_roofline(content: dict[str, Any]) -> Any:
    """Share of the roofline of the chosen path, a line per shape, a mark per result."""
    import matplotlib.pyplot as plt

    found = [own for own in results(content) if own[0]["group"] != "paper"]
    labels = list(dict.fromkeys((row["group"], row["label"]) for row, _, _ in found))
    if not labels:
        return None
    figure, axes = plt.subplots(figsize=(10, 0.26 * len(labels) + 1.8), layout="constrained")
    for kind, color, mark in zip(KIND_NAMES, COLORS, "os^", strict=False):
        points = []
        for row, other, result in found:
            ours, bound = chosen_ms(result), result["roofline_ms"]
            if other == kind and ours and bound:
                points.append((100 * bound / ours, labels.index((row["group"], row["label"]))))
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=color, label=KIND_NAMES[kind], alpha=0.85, markersize=6)
    axes.set_yticks(range(len(labels)), [label for _, label in labels], fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.set_xlabel("share of the roofline that the chosen path reaches")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axes.set_title(_title(content, "How near to what the card can do"), fontsize=10)
    return figure


def _plot_models(content: dict[str, Any]) -> Any:
    """Images per second, a panel per kind of run, size and batch."""
    import matplotlib.pyplot as plt

    merged: dict[tuple[str, int, int, str], dict[str, float]] = {}
    for group in content["models"]:
        panel = merged.setdefault((group["kind"], group["size"], group["batch"], group["dtype"]), {})
        for label, own in group["models"].items():
            if "images_per_second" in own:
                panel.setdefault(label, own["images_per_second"])
    groups = sorted((key, panel) for key, panel in merged.items() if panel)
    groups.sort(key=lambda own: (own[0][1], own[0][0] != "training"))
    if not groups:
        return None
    columns = min(2, len(groups))
    by_row = [groups[start : start + columns] for start in range(0, len(groups), columns)]
    heights = [max(len(entries) for _, entries in row) + 2.2 for row in by_row]
    figure, panels = plt.subplots(
        len(by_row),
        columns,
        figsize=(7.5 * columns, 0.27 * sum(heights) + 0.6),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, ((kind, size, batch, dtype), entries) in zip(panels.flat, groups, strict=False):
        rates = list(entries.values())
        ours = [label.startswith(("replknet", "unireplknet", "slak", "pelk")) for label in entries]
        bars = axes.barh(range(len(rates)), rates, color=[COLORS[1] if own else COLORS[0] for own in ours])
        axes.bar_label(bars, [number(rate) for rate in rates], padding=3, fontsize=8)
        axes.set_yticks(range(len(rates)), entries, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{kind}, {size} px, batch {batch}, {dtype}", fontsize=9)
        axes.set_xlabel("images/s", fontsize=8)
    figure.suptitle(_title(content, "Images per second"), fontsize=11)
    return figure
