"""Write the results as tables: ``python -m bench.tables > bench/README.md``."""

from __future__ import annotations

from pathlib import Path

from bench import tables_cuts, tables_training
from bench.markdown import goals, prose, read, section, seeds, table, variants, where
from bench.record import RESULTS

HEAD = """# Measurements

Made by `python -m bench.tables` from the files in `results`, which have the machine, the versions, the
seeds and the load beside every figure. `make bench` measures again; `python -m bench --quick` only shows
that everything runs. CIFAR-10 and the trained networks are not part of the project: the studies that need
them look in `$SECATEUR_DATA`.
"""


def page(folder: Path = RESULTS) -> str:
    """Give the whole page; a study without results is left out."""
    own = (_speed, _chains, _gemv, _patterns, _global_masks, _sweep, _gradual, _oneshot)
    made = (*own, *tables_cuts.SECTIONS, *tables_training.SECTIONS)
    parts = [part for make in made if (part := make(folder))]
    return "\n".join([HEAD, *parts])


def _speed(folder: Path) -> str:
    study = read(folder, "speed")
    if not study:
        return ""
    found = study["result"]["rows"]
    rivals = list(dict.fromkeys(name for row in found for name in row["milliseconds"]))
    rows = []
    for row in found:
        case, times = row["case"], row["milliseconds"]
        rows.append(
            [
                case["network"],
                f"{case['sparsity']:.0%}",
                str(case["threads"]),
                str(case["batch"]),
                row["isa"],
                *(f"{times[name]['median']:.2f}" if name in times else "" for name in rivals),
                f"{row['speedup']:.2f}x",
                f"{row['error']:.0e}",
                f"{row['dense_bytes'] / row['sparse_bytes']:.1f}x",
            ]
        )
    head = ["network", "sparsity", "threads", "batch", "kernels", *(f"{n}, ms" for n in rivals)]
    head += ["speed-up", "error", "smaller"]
    ort = study["versions"].get("onnxruntime", "")
    text = (
        "## Compiled sparse models\n\nUniform sparsity by magnitude of every convolution and linear "
        "layer but the first; depthwise ones stay\ndense. Dense and sparse ran in turn in one process "
        "on the same inputs, up to eight runs in\na row after one that does not count, OpenVINO (dense) "
        f"after them. Dense is ONNX Runtime {ort}, float32.\nThe speed-up is the median over pairs of "
        "turns; the files have the spreads. Most networks have random\nweights: these figures are about "
        "speed alone.\n"
    )
    return "\n".join([text, where(study), table(head, rows), goals(study)])


def _chains(folder: Path) -> str:
    study = read(folder, "chains")
    if not study:
        return ""
    rows = []
    for row in study["result"]["rows"]:
        case, times, ups = row["case"], row["milliseconds"], row["speedups"]
        rows.append(
            [
                *(case["network"], f"{case['sparsity']:.0%}", str(case["threads"])),
                *(f"{times[name]['median']:.2f}" for name in ("dense", "alone", "chained")),
                *(f"{ups['alone']:.2f}x", f"{ups['chained']:.2f}x", f"{row['ratio']:.2f}x"),
                *(str(row["chains"]), f"{row['error']:.0e}"),
            ]
        )
    head = ["network", "sparsity", "threads", "dense, ms", "sparse, ms", "in chains, ms"]
    head += ["speed-up", "in chains", "ratio", "chains", "error"]
    text = (
        "## Chains: layers around depthwise convolutions, band by band in one operator\n\nThe fastest "
        "plan with chains against the fastest without, batch 1, in turn with the dense model.\n`compile` "
        "keeps what is faster.\n"
    )
    return "\n".join([text, where(study), table(head, rows)])


def _gemv(folder: Path) -> str:
    study = read(folder, "gemv")
    if not study:
        return ""
    found = study["result"]
    rows = [
        [
            row["weights"],
            f"{row['sparsity']:.0%}",
            str(row["tokens"]),
            f"{row['dense_ms']:.2f}",
            f"{row['sparse_ms']:.2f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in found["rows"]
    ]
    head = ["weights", "sparsity", "tokens", "dense PyTorch, ms", "sparse, ms", "speed-up"]
    title = (
        f"## Linear layer {found['inputs']} to {found['outputs']}, weights beyond the caches\n\n"
        "Dense is PyTorch in the same type.\n"
    )
    return "\n".join([title, where(study), table(head, rows), goals(study)])


def _patterns(folder: Path) -> str:
    study = read(folder, "patterns")
    if not study:
        return ""
    found = study["result"]["rows"]
    levels = sorted({point["sparsity"] for row in found for point in row["points"]})
    rows = []
    for row in found:
        cells = {point["sparsity"]: f"{1 / point['ratio']:.2f}x" for point in row["points"]}
        pays = "never" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
        names = [f"{row['layer']}, {row['dtype']}", row["pattern"]]
        speeds = [cells.get(level, "") for level in levels]
        rows.append([*names, *speeds, f"below {pays}" if row["at_most"] else pays])
    head = ["layer", "pattern", *(f"{level:.0%}" for level in levels), "pays from"]
    title = "## Patterns\n\nTimes faster than the dense layer, by sparsity.\n"
    return "\n".join([title, where(study), table(head, rows)])


def _global_masks(folder: Path) -> str:
    study = read(folder, "global_masks")
    if not study:
        return ""
    found = study["result"]
    rows = [
        [
            name,
            f"{found['seconds'][name]['median']:.2f} s",
            f"{found['seconds'][name]['least']:.2f} to {found['seconds'][name]['most']:.2f}",
            f"{found['peak_extra_over_weights'][name]:.2f}",
        ]
        for name in ("secateur", "torch")
    ]
    head = ["global magnitude masks", "median", "range", "peak extra memory / weights"]
    title = f"## Global masks: {found['network']}, {found['prunable']:,} weights\n"
    return "\n".join([title, where(study), table(head, rows), goals(study)])


def _sweep(folder: Path) -> str:
    study = read(folder, "sweep")
    if not study:
        return ""
    rows = [
        [
            row["pattern"],
            row["method"],
            f"{row['relative_output_error']:.4f}",
            f"{row['seconds']:.1f} s",
            f"{row['peak_extra_bytes'] / 1e6:,.0f} MB",
        ]
        for row in study["result"]["rows"]
    ]
    head = ["pattern", "method", "output error", "time", "peak extra memory"]
    width = study["result"]["width"]
    title = f"## Column sweep: one {width} x {width} layer, correlated inputs\n"
    return "\n".join([title, where(study), table(head, rows), goals(study)])


def _gradual(folder: Path) -> str:
    parts = []
    for study in variants(folder, "gradual"):
        rows = []
        for arm in study["result"]["arms"]:
            drop, error = arm.get("drop"), arm.get("drop_standard_error")
            below = "" if drop is None else f"{drop:.2f} ± {error:.2f}"
            rows.append([arm["arm"], f"{arm['accuracy']:.2f} %", below])
        plan = study["result"].get("plan", {})
        if plan.get("trunk", True):
            text = (
                "A dense trunk of 14 epochs, then 12 epochs for every arm with the same schedule; the "
                f"pruned ones prune over the first six; {seeds(study)}."
            )
        else:
            first, last = plan["pruning"]
            text = (
                f"One cycle of {plan['recipe']['epochs']} epochs for every arm, from the same first "
                f"weights; the others prune in epochs {first:g} to {last:g} and learn from the finished "
                f"dense one, to {plan['distillation']:.0%}, besides the labels; {seeds(study)}."
            )
        head = ["arm", "accuracy", "points below dense"]
        parts += [prose(text), where(study), table(head, rows), goals(study)]
    text = (
        "ResNet-20 on CIFAR-10: 40,000 training and 11,000 test images. Differences are counted image by "
        "image; the standard error is that of the images."
    )
    return section("Gradual magnitude pruning", [prose(text), *parts] if parts else [])


def _oneshot(folder: Path) -> str:
    parts = []
    for depth in (20, 56):
        study = read(folder, f"oneshot-resnet{depth}")
        if not study:
            continue
        rows = study["result"]["rows"]
        levels = sorted({row["target"] for row in rows})
        for family in dict.fromkeys(row["allocation"] for row in rows):
            lines = []
            for method in dict.fromkeys(r["method"] for r in rows if r["allocation"] == family):
                found = {
                    r["target"]: r
                    for r in rows
                    if r["method"] == method and r["allocation"] == family
                }
                cells = [f"{found[s]['accuracy']:.1f}" if s in found else "" for s in levels]
                lines.append([method, *cells])
            head = [f"ResNet-{depth}, {family}", *(f"{s:.0%}" for s in levels)]
            parts += [where(study), table(head, lines)]
        parts.append(goals(study))
    if not parts:
        return ""
    text = (
        "## One-shot pruning without training\n\nAccuracy in % on the 1,000 test images (standard error "
        "0.8 points; the files have loss and\nagreement too), 1,024 calibration images. Dense: 91.5 for "
        "ResNet-20, 92.6 for ResNet-56. The\nBatchNorm rows see the calibration images shifted and "
        "mirrored, as in training.\n"
    )
    return "\n".join([text, *parts])


if __name__ == "__main__":
    print(page(), end="")
