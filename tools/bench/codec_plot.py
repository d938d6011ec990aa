"""The plot of tools/bench/codec.py: bytes of a stored row against what is lost of the teacher's distribution."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """size: bytes of a row; kl, p99: nats; changed: share of rows with another likeliest token."""

    name: str
    size: float
    kl: float
    p99: float
    changed: float


PANELS = {
    "kl": "mean KL lost (nats)",
    "p99": "99th percentile of the KL lost (nats)",
    "changed": "rows whose likeliest token changes (share)",
}
ENGINES = {"kl": 1.3e-3, "p99": 6.4e-3}
"""Between the bfloat16 rows of transformers and of SGLang for one teacher, SmolLM2-135M."""
KINDS = {"fisher": "o", "int8": "s", "top-k": "^"}
"""Of each kind of row its mark."""
TICKS = (32, 64, 128, 256, 512, 1024)
SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "grey"}


def draw(lines: Sequence[Line], out: pathlib.Path) -> None:
    """One panel a figure, a colour a kind; full marks for the first teacher, open ones for the second; a PNG."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 4.8), sharex=True, layout="constrained")
    raw = next(line["raw_bytes"] for line in lines if line["metric"] == "bytes")
    for axis, (field, title) in zip(axes, PANELS.items(), strict=True):
        axis.axvline(raw, color="grey", lw=0.8)
        axis.annotate("raw", (raw, 0.02), xycoords=("data", "axes fraction"), xytext=(-22, 0), **SMALL)
        if level := ENGINES.get(field):
            axis.axhline(level, color="grey", lw=0.8, ls="--")
            axis.annotate("two engines", (0.02, level), xycoords=("axes fraction", "data"), xytext=(0, 3), **SMALL)
        for number, teacher in enumerate(dict.fromkeys(line["teacher"] for line in lines)):
            curves(axis, field, points([line for line in lines if line["teacher"] == teacher]), number, teacher)
        axis.set(xscale="log", yscale="log", xlabel="bytes of a stored row")
        axis.xaxis.set_major_locator(FixedLocator(TICKS))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(out, dpi=90)
    pyplot.close(figure)


def points(lines: Sequence[Line]) -> dict[str, list[Point]]:
    """Of each kind, fewest bytes first; lines: of one teacher."""
    shares = {line["case"]: line for line in lines if line["metric"] == "bytes"}
    errors = {line["case"]: line for line in lines if line["metric"] == "error"}
    raw, rivals = shares["raw"], errors["raw"]
    found: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    for case, error in errors.items():
        kind, _, name = case.partition(" ")
        if kind in found:
            size = shares[case]["kdpipe"] * raw["raw_bytes"]
            changed = 1 - error["top1"]
            found[kind].append(Point(name=name, size=size, kl=error["kdpipe"], p99=error["p99"], changed=changed))
    for case, share in raw["rivals"].items():
        kl, p99 = rivals["rivals"][case], rivals["rivals_p99"][case]
        name, size = case.removeprefix("top-"), share * raw["raw_bytes"]
        found["top-k"].append(Point(name=f"k={name}", size=size, kl=kl, p99=p99, changed=0.0))
    return {kind: sorted(of_kind, key=lambda point: point.size) for kind, of_kind in found.items()}


def curves(axis: Axes, field: str, found: Mapping[str, Sequence[Point]], number: int, teacher: str) -> None:
    """Every kind of one teacher, the number-th. What is 0 has no place on the axis."""
    for color, (kind, mark) in enumerate(KINDS.items()):
        # A distribution does not depend on how large a channel is: top-k is the same for both.
        if number and kind == "top-k":
            continue
        shown = [(point.size, value, point.name) for point in found[kind] if (value := getattr(point, field)) > 0]
        axis.plot(
            [size for size, _, _ in shown],
            [value for _, value, _ in shown],
            mark + (":" if number else "-"),
            ms=8 if number else 5,
            mfc="none" if number else None,
            color=f"C{color}",
            label=kind if kind == "top-k" else f"{kind}, {teacher}",
        )
        for size, value, name in () if number else shown:
            axis.annotate(name, (size, value), xytext=(7, 2), **SMALL)
