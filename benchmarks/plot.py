"""Tables and pictures of benchmarks/README.md, all from the JSON files in benchmarks/results; nothing is typed by hand.

    python -m benchmarks.plot                # rewrites what stands between the markers of benchmarks/README.md

A result is shown under the device that it was measured on, and a measurement that is missing says "not measured".
Measurements on a CPU are never shown as those of a GPU: they have a table of their own. Of several results of a suite
on one device the newest file counts.
"""

import argparse
import json
import os
import statistics
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.counted.static_tables import MISSING, static_tables, table
from benchmarks.learning import proof_tables
from benchmarks.record import folder_name
from benchmarks.speed.step_parts import PARTS
from cae_fast.files import replacing, write_text

HERE = Path(__file__).parent
BEGIN, END = "<!-- {name}: written by plot.py -->", "<!-- end of {name} -->"
STEP_MODELS = ("ViT-L", "ViT-H", "ViT-B")
VARIANTS = ("ours", "compiled", "reference", "original", "ours-compiled", "ours-compiled-graphs")
HUES = ("#1f3b73", "#2a9d8f", "#e9c46a", "#8d5fb3", "#e76f51", "#6c757d", "#dddddd")
COLORS = dict(zip((*PARTS, "idle"), HUES, strict=True))

Results = dict[str, dict[str, dict[str, Any]]]
"""Device -> suite -> the newest record; with rows of all its files where ROW_KEYS has the suite."""
ROW_KEYS = {"train_step": ("model", "variant", "batch", "data"), "ops": ("op", "shape", "backend")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args(argv)

    results, static = load(args.results)
    text = args.readme.read_text(encoding="utf-8")
    gpus = [device for device in results if device != "cpu"]
    sections = {
        "measured": measured(results, gpus, args.results, args.readme.parent),
        "cpu": on_a_cpu(results.get("cpu", {})),
        "proof": proof(args.results / "proof_of_learning", args.readme.parent),
        "static": static_tables(static),
    }

    for name, body in sections.items():
        text = put(text, name, body)
    write_text(args.readme, text)
    return 0


def load(folder: Path) -> tuple[Results, dict[str, Any] | None]:
    """Everything in the folder that has a suite, and the static counts."""
    records = []
    for path in sorted(folder.rglob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "suite" in found:
            records.append(found)

    # Oldest first, so that the newest stays.
    results: Results = {}
    static = None
    for found in sorted(records, key=lambda each: each["time"]):
        if found["suite"] == "static":
            static = found
            continue

        suites = results.setdefault(found["device"], {})
        before = suites.get(found["suite"])
        if found["suite"] == "ops":
            found = found | {"rows": [{"ceilings": found["ceilings"]} | row for row in found["rows"]]}

        if before and found["suite"] in ROW_KEYS:
            key = ROW_KEYS[found["suite"]]
            rows = {tuple(row[k] for k in key): row for row in (*before["rows"], *found["rows"])}
            commands = dict.fromkeys((*before["command"].split("; "), found["command"]))
            found = found | {"rows": list(rows.values()), "command": "; ".join(commands)}

        suites[found["suite"]] = found
    return results, static


def put(text: str, name: str, body: str) -> str:
    """Replace what stands between the markers of a section; ValueError where they are missing."""
    begin, end = BEGIN.format(name=name), END.format(name=name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the README needs {begin!r} and {end!r} once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{body.strip()}\n\n{end}{rest.split(end)[1]}"


def measured(results: Results, gpus: list[str], folder: Path, beside: Path) -> str:
    if not gpus:
        return f"Steps, ops, loss parity and tokenizer on a GPU: {MISSING}."
    parts = []
    for device in gpus:
        suites = results[device]
        name = next(iter(suites.values()))
        versions = ", ".join(f"{k} {v}" for k, v in name["versions"].items() if v and k in ("torch", "triton"))
        parts.append(f"### {device}\n\nDriver {name['driver']}, CUDA {name['cuda']}, {versions}.")
        parts.append(correctness(suites.get("correctness")))
        parts.append(peaks(suites.get("peaks")))
        parts.append(step_table(suites.get("train_step")))
        parts.append(parity(suites.get("loss_parity")))
        parts.append(op_table(suites.get("ops")))
        parts.append(tokenizer_table(suites.get("tokenizer")))
        parts += pictures(device, suites, folder, beside)
    return "\n\n".join(parts)


def facts(record: dict[str, Any]) -> str:
    return f"(`{record['command']}`, revision {record['revision']}, {record['time'][:10]})"


def correctness(record: dict[str, Any] | None) -> str:
    if record is None:
        return f"Tests on the GPU: {MISSING}."
    counts = ", ".join(f"{count} {outcome}" for outcome, count in record["counts"].items())
    return f"Tests on the GPU: {counts} {facts(record)}."


def peaks(record: dict[str, Any] | None) -> str:
    """The rates that everything else is held against."""
    if record is None:
        return f"Rates of this card: {MISSING}."
    rates = dict(record["rates"])
    copy = rates.pop("copy", None)
    each = [f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items()]
    each += [f"copy {copy / 1e12:.2f} TB/s"] if copy else []
    return f"Rates of this card at a step's own shapes: {', '.join(each)} {facts(record)}."


def step_table(record: dict[str, Any] | None) -> str:
    head = ["step", "batch", "ms (median)", "images/s", "MFU model / all", "peak GB", "ours is", "largest batch"]
    head += [*PARTS, "idle"]
    rows = []

    # Models and variants on synthetic data, also those that nobody has measured.
    done = [] if record is None else [row for row in record["rows"] if row["model"] != "tiny"]
    found = {(row["model"], row["variant"]): row for row in done if row["data"] == "synthetic"}
    for model in STEP_MODELS:
        ours = found.get((model, "ours"), {})
        for variant in VARIANTS:
            row = found.get((model, variant), {})
            if "step_ms" not in row:
                rows.append([f"{model} {variant}", MISSING, *[""] * (len(head) - 2)])
                continue
            rows.append([f"{model} {variant}", str(row["batch"]), *step_cells(row, ours)])

    for row in done:
        if row["data"] != "synthetic" and "step_ms" in row:
            ours = found.get((row["model"], "ours"), {})
            rows.append([f"{row['model']} {row['variant']}, real images", str(row["batch"]), *step_cells(row, ours)])

    title = "Whole pretraining steps" + ("" if record is None else f" {facts(record)}") + "; the right half in ms:"
    return f"{title}\n\n{table(head, rows)}"


def step_cells(row: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    mfu = MISSING if row["mfu_all"] is None else f"{row['mfu_model']:.1%} / {row['mfu_all']:.1%}"
    peak = MISSING if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
    ratio = f"{ours['images_per_second'] / row['images_per_second']:.2f}x" if "step_ms" in ours else MISSING
    cells = [f"{statistics.median(row['step_ms']):.1f}", f"{row['images_per_second']:.0f}", mfu, peak, ratio]
    cells.append(str(row.get("largest_batch", MISSING)))
    return [*cells, *(f"{row['profile']['parts'][part]:.1f}" for part in PARTS), f"{row['idle_ms']:.1f}"]


def parity(record: dict[str, Any] | None) -> str:
    if record is None or not record.get("kernels_ran"):  # a run that was cut short has curves only
        return f"Loss parity of the fused path: {MISSING}."
    each = ", ".join(f"{path} {value:.4f}" for path, value in record["deviations"].items())
    verdict = "passed" if record["passed"] else "failed"
    steps = len(record["curves"]["float32"][0])
    return f"Loss parity, largest distance from float32 over {steps} steps: {each}; {verdict} {facts(record)}."


def op_table(record: dict[str, Any] | None) -> str:
    if record is None:
        return f"Ops: {MISSING}."

    head = ["op", "shape", "backend", "forward us", "backward us", "share of copy", "of the floor", "against reference"]
    rows = []
    references = {(row["op"], row["shape"]): row for row in record["rows"] if row["backend"] == "reference"}
    for row in record["rows"]:
        reference = references.get((row["op"], row["shape"]), {})
        start = [row["op"], row["shape"], row["backend"]]
        if "forward_ms" not in row or "failed" in row:
            rows.append([*start, MISSING if "failed" not in row else "failed", *[""] * 4])
            continue

        times = pass_times(row)
        share = sum(row["moved"][: len(times)]) / sum(times) * 1e3 / row["ceilings"]["copy"]
        ratio = f"{sum(pass_times(reference)) / sum(times):.2f}x" if "forward_ms" in reference else MISSING
        backward = f"{times[1] * 1e3:.0f}" if len(times) > 1 else "-"
        floor = f"{floor_ms(row) / sum(times):.0%}"
        rows.append([*start, f"{times[0] * 1e3:.0f}", backward, f"{share:.0%}", floor, ratio])

    ceilings = record["ceilings"]
    reached = f"copy {ceilings['copy'] / 1e12:.2f} TB/s, product {ceilings['product'] / 1e12:.0f} TFLOP/s"
    return f"Ops {facts(record)}; {reached}:\n\n{table(head, rows)}"


def pass_times(row: dict[str, Any]) -> list[float]:
    """Median milliseconds of the passes that were timed."""
    return [statistics.median(row[key]) for key in ("forward_ms", "backward_ms") if key in row]


def floor_ms(row: dict[str, Any]) -> float:
    count, ceilings = len(pass_times(row)), row["ceilings"]
    return max(sum(row["moved"][:count]) / ceilings["copy"], sum(row["flops"][:count]) / ceilings["product"]) * 1e3


def tokenizer_table(record: dict[str, Any] | None) -> str:
    if record is None:
        return f"Tokenizer: {MISSING}."
    rows = [
        [row["name"], f"{row['ms']:.1f}", f"{row['images_per_second']:.0f}", f"{row['gb']:.1f}", f"{row['agree']:.2%}"]
        for row in record["rows"]
    ]
    head = ["DALL-E's encoder", f"ms for {record['batch']} images", "images/s", "GB of convolutions", "same codes"]
    return f"Tokenizer {facts(record)}:\n\n{table(head, rows)}"


def on_a_cpu(suites: dict[str, dict[str, Any]]) -> str:
    """Ratios at tiny sizes, with plain torch in place of every kernel: they say that it runs, not how fast a GPU is."""
    record = suites.get("train_step")
    if record is None:
        return f"On a CPU: {MISSING}."
    head = ["tiny step on a CPU", "ms (median)", "ours is"]
    done = {row["variant"]: row for row in record["rows"] if "step_ms" in row}
    rows = []
    for variant in VARIANTS:
        row = done.get(variant)
        cells = [MISSING, ""] if row is None or "ours" not in done else step_cells(row, done["ours"])[0::4][:2]
        rows.append([variant, *cells])
    return f"CPU {record['processor']} {facts(record)}:\n\n{table(head, rows)}"


def proof(folder: Path, beside: Path) -> str:
    """What proof_of_learning.py found: its table and a picture beside its results."""
    path = folder / "results.json"
    if not path.exists():
        return f"Pretraining against random weights: {MISSING}."

    record = json.loads(path.read_text(encoding="utf-8"))
    proof_tables.draw(record["results"], folder / "probes.png")
    steps = ", ".join(f"{name} {count:,}" for name, count in record["steps"].items())
    shown = os.path.relpath(folder / "probes.png", beside)
    made = record["provenance"]
    source = f"revision {made['revision']}, torch {made['versions']['torch']}"
    title = f"Top-1 in % of 2,000 test images, mean (lowest..highest) over seeds; steps of pretraining: {steps}"
    title += f" (`benchmarks/learning/proof_of_learning.py`, {source})"
    return f"{title}:\n\n{proof_tables.table(record['results'])}\n![Probes of every variant]({shown})"


def pictures(device: str, suites: dict[str, dict[str, Any]], folder: Path, beside: Path) -> list[str]:
    """Draws what there are numbers for, beside the results; returns the lines that show it."""
    shown = []
    target = folder / folder_name(device)
    target.mkdir(parents=True, exist_ok=True)
    if "train_step" in suites and draw_steps(device, suites["train_step"], target / "steps.png"):
        shown.append(f"![Milliseconds of a step by part]({os.path.relpath(target / 'steps.png', beside)})")
    if "ops" in suites and draw_roofline(device, suites["ops"], target / "roofline.png"):
        shown.append(f"![Roofline of the ops]({os.path.relpath(target / 'roofline.png', beside)})")
    return shown


def draw_steps(device: str, record: dict[str, Any], path: Path) -> bool:
    """Stacked bars, scaled to the measured step: parts of streams that overlap add up to more."""
    done = [row for row in record["rows"] if "step_ms" in row and row["model"] != "tiny"]
    done.sort(key=lambda row: (STEP_MODELS.index(row["model"]), row["data"] != "synthetic"))
    if not done:
        return False

    figure, axes = new_figure(1.2 + 0.45 * len(done))
    for place, row in enumerate(done):
        median = statistics.median(row["step_ms"])
        parts = row["profile"]["parts"] | {"idle": row["idle_ms"]}
        scale, left = median / sum(parts.values()), 0.0
        for part, value in parts.items():
            label = part if place == 0 else None
            axes.barh(place, value * scale, left=left, color=COLORS[part], label=label, height=0.7)
            left += value * scale
        axes.text(left, place, f" {median:.0f} ms, {row['images_per_second']:.0f} images/s", va="center", fontsize=8)

    names = [f"{row['model']} B={row['batch']} {row['variant']}" for row in done]
    names = [name + ("" if row["data"] == "synthetic" else ", real") for name, row in zip(names, done, strict=True)]
    axes.set_yticks(range(len(done)), names)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set(xlabel="ms of a step", title=device)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    save_figure(figure, path)
    return True


def draw_roofline(device: str, record: dict[str, Any], path: Path) -> bool:
    """Reached FLOP/s over FLOPs per byte, for the ops with matrix products."""
    done = [row for row in record["rows"] if "forward_ms" in row and "failed" not in row and sum(row["flops"])]
    if not done:
        return False

    ceilings = record["ceilings"]
    figure, axes = new_figure(5)
    intensities = [10 ** (exponent / 10) for exponent in range(45)]
    roof = [min(ceilings["copy"] * each, ceilings["product"]) / 1e12 for each in intensities]
    axes.loglog(intensities, roof, color="#333333", linewidth=1)

    # Colours tell ops, markers backends; should there be more of them, they begin again.
    markers = dict(zip(dict.fromkeys(row["backend"] for row in done), cycle("osD^vPX*<>")))
    colors = dict(zip(dict.fromkeys(row["op"] for row in done), cycle(HUES)))
    for row in done:
        count = len(pass_times(row))
        flops, moved = sum(row["flops"][:count]), sum(row["moved"][:count])
        rate = flops / sum(pass_times(row)) / 1e9
        axes.plot(flops / moved, rate, markers[row["backend"]], color=colors[row["op"]], markersize=6)

    for op, color in colors.items():
        axes.plot([], [], "s", color=color, label=op)
    for backend, marker in markers.items():
        axes.plot([], [], marker, color="#888888", label=backend)
    axes.set(xlabel="FLOPs per byte that must move", ylabel="TFLOP/s, forward and backward", title=device)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    save_figure(figure, path)
    return True


def new_figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
