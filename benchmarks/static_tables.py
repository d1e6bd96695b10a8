"""The section of benchmarks/README.md that needs no GPU: what benchmarks/static.py counted, as tables."""

from collections.abc import Iterable
from typing import Any

MISSING = "not measured"
PASSES = ("forward", "backward")
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
    parts.append(
        f"Ops, forward / backward; floors from what must move and the FLOPs of products:\n\n{op_counts(record)}"
    )
    return "\n\n".join(parts)


def assumed(ceilings: dict[str, list[float]]) -> str:
    each = (
        f"{name} {flops / 1e12:.0f} TFLOP/s and {speed / 1e12:.1f} TB/s" for name, (flops, speed) in ceilings.items()
    )
    return f"Assumed ceilings, large bf16 products and a device copy: {'; '.join(each)}."


def step_counts(record: dict[str, Any]) -> str:
    head = ["step", "launches", "GB", *(f"GB {part}" for part in STEP_PARTS), "GB but products", "GFLOP an image"]
    head += [f"{name}: products + rest, ms" for name in record["ceilings"]]
    rows = []
    for row in record["steps"]:
        parts = row["parts"]
        total = {key: sum(part[key] for part in parts.values()) for key in ("launches", "bytes", "other_bytes")}
        cells = [f"{row['model']} B={row['batch']} {row['way']}", str(total["launches"]), gb(total["bytes"])]
        cells += [gb(parts[part]["bytes"]) for part in STEP_PARTS]
        cells += [gb(total["other_bytes"]), f"{row['flops_all'] / row['batch'] / 1e9:.1f}"]
        for flops, speed in record["ceilings"].values():
            products, rest = row["flops_all"] / flops * 1e3, total["other_bytes"] / speed * 1e3
            cells.append(f"{products:.0f} + {rest:.0f} = {products + rest:.0f}")
        rows.append(cells)
    return table(head, rows)


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
        for flops, speed in record["ceilings"].values():
            each = zip(row["moved"], row["flops"], row["ours"], strict=False)
            cells.append(" / ".join(f"{max(moved / speed, work / flops) * 1e6:.0f}" for moved, work, _ in each))
        rows.append(cells)
    return table(head, rows)
