"""Table and picture of what proof_of_learning.py measured: results[set][variant][seed] with accuracies in percent."""

import statistics
from pathlib import Path
from typing import Any

from cae_fast.files import replacing

COLUMNS = {"knn": "k-NN", "linear": "linear", "linear_class_token": "linear (class token)", "attentive": "attentive"}


def table(results: dict[str, Any]) -> str:
    """Markdown: means and, over seeds, the smallest and the largest value."""
    titles = ["set", "variant", *COLUMNS.values(), "decoded without regressor"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, variants in results.items():
        for variant, runs in variants.items():
            cells = []
            for column, digits in (*((probe, 1) for probe in COLUMNS), ("decoded", 2)):
                values = [value[column] for value in runs.values() if column in value]
                spread = f" ({min(values):.{digits}f}..{max(values):.{digits}f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
            lines.append(f"| {name} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 4), layout="constrained")
    for axes, (name, variants) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        width = 0.85 / len(variants)
        for position, (variant, runs) in enumerate(variants.items()):
            for offset, probe in enumerate(COLUMNS):
                values = [value[probe] for value in runs.values() if probe in value]
                if values:
                    place = offset + (position - (len(variants) - 1) / 2) * width
                    label = variant * (offset == 0)
                    axes.bar(place, statistics.mean(values), 0.9 * width, color=f"C{position}", label=label)
                    axes.plot([place] * len(values), values, "k.", markersize=3)

        axes.set_xticks(range(len(COLUMNS)), [title.replace(" (", "\n(") for title in COLUMNS.values()])
        axes.set_title(f"{name}: top-1 in %, dots are seeds")
        axes.axhline(10, color="black", linewidth=0.8, linestyle=":", label="chance")
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
