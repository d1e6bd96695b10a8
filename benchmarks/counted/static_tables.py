"""The section of benchmarks/README.md that needs no GPU: what benchmarks/counted/static.py counted, as tables."""

import textwrap
from collections.abc import Iterable
from typing import Any

MISSING = "not measured"
PASSES = ("forward", "backward")
# What the counts of a ViT-L step on an H100 leave out, as estimated: attention and tokenizer passes below the rate of a
# copy, FlashAttention-2's float32 workspace, gaps between launches.
NOT_COUNTED_MS = {"ours": 9, "compiled": 15}
STEP_PARTS = ("tokenizer", "forward", "backward", "optimizer")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def static_tables(record: dict[str, Any] | None) -> str:
    if record is None:
        return f"Counts: {MISSING}."
    where = f"`{record['command']}`, revision {record['revision']}, torch {record['versions']['torch']}"
    parts = [f"Counted ({where}), not measured: nothing ran. {assumed(record['ceilings'])}"]
    parts.append(f"Whole steps:\n\n{step_counts(record)}")
    parts.append(f"Ours, forward and backward, by op:\n\n{largest_ops(record)}")
    parts.append(predicted(record))
    parts.append(
        f"Ops, forward / backward; floors from what must move and the FLOPs of products:\n\n{op_counts(record)}"
    )
    return "\n\n".join(parts)


def assumed(ceilings: dict[str, dict[str, float]]) -> str:
    each = (
        f"{name}: linear layers {rates['linears'] / 1e12:.0f} TFLOP/s, convolutions "
        f"{rates['convolutions'] / 1e12:.0f}, copies {rates['copy'] / 1e12:.1f} TB/s"
        for name, rates in ceilings.items()
    )
    return f"Assumed rates (`cae_fast/cost/devices.py`; `peaks.py` measures a card's own): {'; '.join(each)}."


def step_ms(row: dict[str, Any], rates: dict[str, float]) -> tuple[float, float, float]:
    """Milliseconds of linear layers, of convolutions, and of everything else's bytes."""
    other = sum(part["other_bytes"] for part in row["parts"].values())
    convolutions = (row["flops_all"] - row["flops_model"]) / rates["convolutions"]
    return row["flops_model"] / rates["linears"] * 1e3, convolutions * 1e3, other / rates["copy"] * 1e3


def step_counts(record: dict[str, Any]) -> str:
    head = ["step", "launches", "GB", *(f"GB {part}" for part in STEP_PARTS), "GB but products", "GFLOP an image"]
    head += [f"{name}: linears + convolutions + rest, ms" for name in record["ceilings"]]
    rows = []
    for row in record["steps"]:
        parts = row["parts"]
        total = {key: sum(part[key] for part in parts.values()) for key in ("launches", "bytes", "other_bytes")}
        cells = [f"{row['model']} B={row['batch']} {row['way']}", str(total["launches"]), gb(total["bytes"])]
        cells += [gb(parts[part]["bytes"]) for part in STEP_PARTS]
        cells += [gb(total["other_bytes"]), f"{row['flops_all'] / row['batch'] / 1e9:.1f}"]
        for rates in record["ceilings"].values():
            parts_ms = step_ms(row, rates)
            cells.append(f"{' + '.join(f'{ms:.0f}' for ms in parts_ms)} = {sum(parts_ms):.0f}")
        rows.append(cells)
    return table(head, rows)


def ours_by_op(record: dict[str, Any], model: str) -> dict[str, list[int]]:
    """Launches and bytes of ours, forward and backward together."""
    total: dict[str, list[int]] = {}
    for row in record["steps"]:
        if (row["model"], row["way"]) == (model, "ours"):
            for part in PASSES:
                for name, (launches, moved) in row["parts"][part]["by_op"].items():
                    before = total.get(name, [0, 0])
                    total[name] = [before[0] + launches, before[1] + moved]
    return total


def largest_ops(record: dict[str, Any]) -> str:
    models = list(dict.fromkeys(row["model"] for row in record["steps"]))
    found = {model: ours_by_op(record, model) for model in models}
    names = sorted(found[models[0]], key=lambda name: -found[models[0]][name][1])[:12] if models else []
    head = ["op", *(f"{model}: launches, GB" for model in models)]
    rows = [[f"`{name}`", *(each(found[model].get(name, [0, 0])) for model in models)] for name in names]
    return table(head, rows)


def each(counts: list[int]) -> str:
    return f"{counts[0]}, {gb(counts[1])}"


def predicted(record: dict[str, Any]) -> str:
    """What the counts say about ViT-L at batch 256 on an H100, and where ours and torch.compile differ."""
    steps = {row["way"]: row for row in record["steps"] if row["model"] == "ViT-L"}
    if not {"ours", "compiled"} <= set(steps):
        return f"Predicted: {MISSING}."

    # The counts at the assumed rates, and with what they leave out.
    counted = {way: sum(step_ms(steps[way], record["ceilings"]["H100"])) for way in NOT_COUNTED_MS}
    whole = {way: counted[way] + more for way, more in NOT_COUNTED_MS.items()}

    # Bytes of everything but products, where the two differ.
    rest = {way: gb(sum(steps[way]["parts"][part]["other_bytes"] for part in PASSES)) for way in counted}
    backward = {way: gb(steps[way]["parts"]["backward"]["other_bytes"]) for way in counted}
    ops = ours_by_op(record, "ViT-L")
    gelu = ops["bias_gelu"][1] + ops["bias_gelu_backward"][1]

    left_out = "{ours} and {compiled} ms".format(**NOT_COUNTED_MS)
    sentences = [
        "Predicted for ViT-L at batch 256 on an H100, an estimate and no measurement: ours about "
        f"{whole['ours']:.0f} ms, torch.compile about {whole['compiled']:.0f} ms, "
        f"{whole['compiled'] / whole['ours']:.2f}x.",
        f"Of that {counted['ours']:.0f} and {counted['compiled']:.0f} ms are these counts at the assumed rates "
        f"({counted['compiled'] / counted['ours']:.2f}x); {left_out} are estimated for attention and tokenizer passes "
        "below the rate of a copy, FlashAttention-2's float32 workspace in torch.compile's backward pass, and gaps.",
        f"In the forward and backward pass ours moves {rest['ours']} GB besides products, torch.compile "
        f"{rest['compiled']} GB: it fuses the forward pass as well as ours and loses in the backward pass "
        f"({backward['compiled']} GB against {backward['ours']} GB).",
        f"Bias and GELU are passes over the product, not its epilogue: {gb(gelu)} GB.",
        f"Bias gradients of linear layers are sums of their own: {gb(ops['sum'][1])} GB (`sum`).",
    ]
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)


def gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def op_counts(record: dict[str, Any]) -> str:
    ways = ("ours", "eager", "compiled")
    head = ["op", "shape", *(f"{way}: launches" for way in ways), *(f"{way}: MB" for way in ways)]
    head += [f"floor {name}, us" for name in record["ceilings"]]
    rows = []
    for row in record["ops"]:
        cells = [row["op"], row["shape"]]
        cells += [" / ".join(str(each["launches"]) for each in row[way]) for way in ways]
        cells += [" / ".join(f"{each['bytes'] / 1e6:.0f}" for each in row[way]) for way in ways]
        count = len(row["ours"])  # passes: without a backward one for what trains nothing
        for rates in record["ceilings"].values():
            passes = zip(row["moved"][:count], row["flops"][:count], strict=True)
            floors = (max(moved / rates["copy"], work / rates["linears"]) for moved, work in passes)
            cells.append(" / ".join(f"{seconds * 1e6:.0f}" for seconds in floors))
        rows.append(cells)
    return table(head, rows)
