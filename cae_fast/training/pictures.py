"""Pictures of a run: its training curves, and its reconstructions of masked images.

Shapes: K images, S side in pixels, p patch size, N = (S / p)^2 patches in row-major order, Nm masked patches.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cae_fast.config import UserError
from cae_fast.files import replacing
from cae_fast.models.targets import patchify

MAX_POINTS = 300
"""Longer curves are drawn as the means of this many bins, with the range of each bin behind."""
GRAY = 0.5
"""Value of masked patches in the picture."""
MIN_CELL = 128
"""Smaller images are enlarged by a whole factor to at least this side in pixels."""
GAP, TITLE_HEIGHT = 8, 34
TRIPLE_TITLES = ("input", "masked input", "reconstruction")
PAIR_TITLES = ("input", "from its codes")

LOSSES = (("loss", "total", "#22223b"), ("loss_main", "main", "#1f77b4"), ("loss_align", "alignment", "#e07a1f"))
BELOW = (
    ("lr", "learning rate", "#2a9d8f"),
    ("grad_norm", "gradient norm", "#8d5fb3"),
    ("images_per_second", "images per second", "#5c677d"),
)


def save_curves(metrics_jsonl: Path, out: Path) -> None:
    """Draw losses, learning rate, gradient norm and speed over the steps of a metrics.jsonl into a PNG file.

    Raises UserError when the file holds no interval.
    """
    import matplotlib

    with open(metrics_jsonl, encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    lines = [entry for entry in entries if "event" not in entry]
    skipped = [entry["step"] for entry in entries if entry.get("event") == "skipped_step"]
    if not lines:
        raise UserError(f"{metrics_jsonl}: no metrics to draw yet")

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.grid": True,
        "axes.grid.which": "both",
        "grid.color": "#e8e8e8",
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "agg.path.chunksize": 10000,
    }
    with matplotlib.rc_context(style):
        figure = _curves_figure(lines, skipped)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _curves_figure(lines: list[dict[str, Any]], skipped: list[int]) -> Any:
    # A Figure alone, without pyplot, keeps no global state and needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")

    # Above, over the whole width: the losses, and the steps that were skipped.
    grid = figure.add_gridspec(2, 3, height_ratios=[1.7, 1])
    axes = figure.add_subplot(grid[0, :])
    for name, label, color in LOSSES:
        _draw(axes, lines, name, color=color, label=label)
    _log_scale_if_wide(axes, lines, [name for name, _, _ in LOSSES])
    if skipped:
        axes.plot(skipped, [0.015] * len(skipped), "|", color="#c1121f", transform=axes.get_xaxis_transform())
        axes.plot([], [], "|", color="#c1121f", label=f"skipped step ({len(skipped)})")
    axes.set(xlabel="step", ylabel="loss (mean of an interval)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="upper right", ncols=4)

    for column, (name, title, color) in enumerate(BELOW):
        small = figure.add_subplot(grid[1, column])
        _draw(small, lines, name, color=color, label=title)
        small.set_title(title, fontsize=10, loc="left", color="#333333")
        small.set_xlabel("step")
        if name == "grad_norm":
            _log_scale_if_wide(small, lines, [name])
        else:
            small.set_ylim(bottom=0)

    for index, each in enumerate(figure.axes):
        _format_ticks(each, [line["step"] for line in lines], ticks=8 if index == 0 else 4)
    figure.suptitle(_curves_title(lines[-1]), fontsize=12, x=0.01, ha="left")
    return figure


def _draw(axes: Any, lines: list[dict[str, Any]], name: str, color: str, label: str) -> None:
    """One curve; a value that was not finite (null in the file) leaves a gap."""
    present = [line for line in lines if name in line]
    if not present:
        return
    steps = np.array([line["step"] for line in present], dtype=np.float64)
    values = np.array([math.nan if line[name] is None else line[name] for line in present], dtype=np.float64)

    # More points than pixels: means of bins, over what is finite in them, and their range behind.
    if len(steps) > MAX_POINTS:
        edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)[:-1]
        sizes = np.diff(np.append(edges, len(steps)))
        low, high = np.fmin.reduceat(values, edges), np.fmax.reduceat(values, edges)
        finite = np.isfinite(values)
        counts = np.add.reduceat(finite.astype(np.float64), edges)
        sums = np.add.reduceat(np.where(finite, values, 0.0), edges)
        steps = np.add.reduceat(steps, edges) / sizes
        values = np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)

    marker = "o" if len(steps) <= 30 else None
    axes.plot(steps, values, color=color, label=label, linewidth=1.6, marker=marker, markersize=4)


def _log_scale_if_wide(axes: Any, lines: list[dict[str, Any]], names: list[str]) -> None:
    values = [line[name] for line in lines for name in names if line.get(name) is not None]
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
    elif values and min(values) >= 0:
        axes.set_ylim(bottom=0)


def _format_ticks(axes: Any, steps: list[int], ticks: int) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

    first, last = steps[0], steps[-1]
    margin = max(0.01 * (last - first), 1)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if last >= 10_000 else thousands)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    large = axes.get_ylim()[1] >= 1000
    axes.yaxis.set_major_formatter(thousands if large else FuncFormatter(lambda value, _: f"{value:g}"))


def _curves_title(last: dict[str, Any]) -> str:
    parts = [f"step {last['step']:,} (epoch {last['epoch']:.2f})"]
    for name, label, _ in LOSSES:
        if last.get(name) is not None:
            parts.append(f"{'total loss' if name == 'loss' else label} {last[name]:.4g}")
    if last.get("accuracy") is not None:
        parts.append(f"accuracy {last['accuracy']:.1%}")
    return "  ·  ".join(parts)


def reconstruct(images: Tensor, masked_ids: Tensor, predicted: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Images with their masked patches gray, and with them replaced by the prediction; both (K, 3, S, S) float32.

    `images` (K, 3, S, S) in [0, 1]; `masked_ids` (K, Nm) integers; `predicted` (K, Nm, p*p*3) pixel values, a patch
    laid out as (row, column, channel), clamped to [0, 1]. Visible patches come from the input.
    """
    count, channels, side, _ = images.shape
    cells = side // patch_size
    patches = patchify(images.float(), patch_size)  # (K, N, p*p*3)
    index = masked_ids.long().unsqueeze(-1).expand(-1, -1, patches.shape[-1])  # (K, Nm, p*p*3)
    results = []
    for fill in (torch.full_like(predicted, GRAY), predicted.clamp(0, 1)):
        filled = patches.scatter(1, index, fill.float())
        filled = filled.reshape(count, cells, cells, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
        results.append(filled.reshape(images.shape))
    return results[0], results[1]


def save_reconstructions(out: Path, images: Tensor, masked_ids: Tensor, predicted: Tensor, patch_size: int) -> None:
    """Draw input, masked input and reconstruction of the first 8 images side by side into a PNG file.

    Shapes and units as `reconstruct`. Four images and more are drawn two to a row.
    """
    images, masked_ids, predicted = (tensor[:8].detach().cpu() for tensor in (images, masked_ids, predicted))
    masked, rebuilt = reconstruct(images, masked_ids, predicted, patch_size)
    _save_rows(out, torch.stack([images.float(), masked, rebuilt], dim=1), TRIPLE_TITLES)


def save_pairs(out: Path, images: Tensor, decoded: Tensor) -> None:
    """Draw images (K, 3, S, S) in [0, 1] beside what a tokenizer made of their codes, the first 16, into a PNG file."""
    _save_rows(out, torch.stack([images.float(), decoded.float()], dim=1)[:16].detach().cpu(), PAIR_TITLES)


def _save_rows(out: Path, rows: Tensor, titles: tuple[str, ...]) -> None:
    """Rows (K, pictures, 3, S, S) of pictures in [0, 1], one title for each column."""
    pixels = (rows.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    scale = max(1, math.ceil(MIN_CELL / rows.shape[-1]))
    cells = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3).numpy()
    canvas = _compose(cells, titles, groups=2 if len(rows) >= 4 else 1)
    with replacing(out) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def _compose(cells: np.ndarray, titles: tuple[str, ...], groups: int) -> Image.Image:
    """Place cells (K, pictures, side, side, 3) as rows of `groups` times `pictures` below their titles."""
    count, columns, side = cells.shape[:3]
    group_width = columns * side + (columns - 1) * GAP
    width = groups * group_width + (groups - 1) * 4 * GAP + 2 * GAP
    height = TITLE_HEIGHT + math.ceil(count / groups) * (side + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=16)

    for group in range(groups):
        left = GAP + group * (group_width + 4 * GAP)
        for column, title in enumerate(titles):
            center = left + column * (side + GAP) + side // 2
            draw.text((center, TITLE_HEIGHT // 2), title, fill="#333333", font=font, anchor="mm")
        for row, pictures in enumerate(cells[group::groups]):
            for column, cell in enumerate(pictures):
                position = (left + column * (side + GAP), TITLE_HEIGHT + row * (side + GAP))
                canvas.paste(Image.fromarray(cell), position)
    return canvas
