"""Sections about networks that are cut: what can go, what it costs, and what it gains."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.markdown import (
    differences,
    each,
    goals,
    prose,
    read,
    section,
    seeds,
    table,
    variants,
    where,
)


def _coverage(folder: Path) -> str:
    study = read(folder, "coverage")
    if not study:
        return ""
    result = study["result"]
    found, rival = result["rows"], result["torch_pruning"]
    told = (
        f"{len(found)} architectures with random weights, each cut in {result['choices']} random "
        "ways; the error is the largest relative difference between a cut network and the masked "
        "one. Removable is the share of the parameters that goes when every width keeps a single "
        "group. "
    )
    if rival:
        works = sum(row.get("their") == "works" for row in found)
        told += (
            f"Torch-Pruning {rival} with its defaults, filters by magnitude, half of the channels: "
            f"works for {works} of {len(found)}; the file has its messages. "
        )
    else:
        told += "Torch-Pruning was not installed. "
    speed = result["couple_resnet50"]
    told += f"ResNet-50 at 224 pixels is traced, coupled and cut in {speed['ours']:.2f} s"
    if "theirs" in speed:
        told += f", by Torch-Pruning in {speed['theirs']:.2f} s ({speed['ratio']:.2f}x)"
    told += f", medians of {speed['repeats']} runs."
    head = ["network", "parameters", "widths", "groups", "removable", "error", "seconds"]
    theirs = ["Torch-Pruning", "it removed", "its seconds"] if rival else []
    rows = [_covered(row) + (_rival(row) if rival else []) for row in found]
    parts = [prose(told), where(study), table([*head, *theirs], rows), goals(study)]
    return section("Coverage of architectures", parts)


def _covered(row: dict[str, Any]) -> list[str]:
    if not row["traced"]:
        return [row["network"], "", "", "", "not traced", "", ""]
    return [
        row["network"],
        f"{row['parameters']:,}",
        str(row["widths"]),
        str(row["groups"]),
        f"{row['removable']:.1%}",
        "not cut" if row["error"] is None else f"{row['error']:.0e}",
        f"{row['seconds']:.2f}",
    ]


def _rival(row: dict[str, Any]) -> list[str]:
    """What it said, up to the colon: the rest is long, and may name files of the machine."""
    said = row["their"].partition(":")[0].strip()
    if len(said) > 40 or any(sign in said for sign in "/|<"):
        said = "failed"
    removed, seconds = row.get("their_removed"), row.get("their_seconds")
    return [
        said,
        "" if removed is None else f"{removed:.1%}",
        "" if seconds is None else f"{seconds:.2f}",
    ]


def _compensation(folder: Path) -> str:
    parts = []
    for depth in (20, 56):
        study = read(folder, f"compensation-resnet{depth}")
        if not study:
            continue
        result = study["result"]
        dense = result["dense"]
        rows = [["uncut", f"{dense['accuracy']:.1f} %", "", f"{dense['loss']:.3f}", "", "", ""]]
        for row in result["rows"]:
            before, after = row["parameters"]
            lost = f"{row['points_lost']:.2f} ± {row['standard_error']:.2f}"
            cells = [row["recipe"], f"{row['accuracy']:.1f} %", lost, f"{row['loss']:.3f}"]
            cells += [f"{row['macs']:.1%}", f"{after / before:.1%}", f"{row['seconds']:.0f} s"]
            rows.append(cells)
        told = (
            f"ResNet-{depth}, {result['images']:,} test images, {result['calibration']:,} "
            "calibration images."
        )
        head = [f"ResNet-{depth}", "accuracy", "points lost", "loss"]
        head += ["multiply-adds", "parameters", "time"]
        parts += [prose(told), where(study), table(head, rows), goals(study)]
    if not parts:
        return ""
    text = (
        "Trained networks for CIFAR-10 cut to half of their multiply-adds. Rows that are compensated: all "
        "layers are fitted by least squares to the outputs of the uncut network, and BatchNorms keep its "
        "statistics. Readers only: just the layers that read what was cut are fitted, and BatchNorm is "
        "estimated anew, as it is in the rows without compensation. "
        "Points lost are counted image by image against the uncut network; the standard error is that "
        "of the images."
    )
    return section("Half the multiply-adds without training", [prose(text), *parts])


def _recovered(folder: Path) -> str:
    parts = []
    for study in variants(folder, "recovered"):
        result, plan = study["result"], study["result"]["plan"]
        rows = []
        for kind, found in result["networks"].items():
            cut, gap = kind != "dense", result["differences"].get(kind)
            before = result["before"]["pruned" if cut else "dense"]
            cells = [f"{result['macs'][cut] / result['macs'][0]:.1%}"]
            cells += [f"{each['test']['accuracy']:.2f} %" for each in (before, found)]
            shown = f"{gap['mean']:+.2f} ± {gap['standard_error_of_images']:.2f}" if gap else ""
            rows.append([kind, *cells, shown])
        told = (
            f"ResNet-{plan['depth']}: {plan['recipe']['epochs']} epochs of "
            f"{plan['train_images']:,} images, highest learning rate {plan['recipe']['rate']:g}, "
            f"{plan['test_images']:,} test images; {seeds(study)}."
        )
        head = [f"ResNet-{plan['depth']}", "multiply-adds", "before fine-tuning", "after"]
        head.append("points above dense")
        parts += [prose(told), where(study), table(head, rows), goals(study)]
    if not parts:
        return ""
    text = (
        "Cut to half of the multiply-adds in five rounds and compensated, then fine-tuned; the uncut "
        "network is fine-tuned with the same batches and learning rates. Distilled: the same cut network, "
        "which learns from the fine-tuned dense one. Matched: it learns from that one alone, without "
        "labels, on blends of two images. Differences are counted image by image; the standard error is "
        "that of the images."
    )
    return section("Half the multiply-adds with fine-tuning", [prose(text), *parts])


def _structural(folder: Path) -> str:
    study = read(folder, "structural")
    if not study:
        return ""
    rows = []
    for row in study["result"]["rows"]:
        about = [row["network"], row["target"], row["allocation"], str(row.get("align") or "")]
        about.append(str(row["batch"]))
        if row.get("refused"):
            rows.append([*about, "", "", "refused", "", "", ""])
            continue
        times, (before, after) = row["milliseconds"], row["parameters"]
        low, high = row["speedup_range"]
        rows.append(
            [
                *about,
                f"{times['dense']['median']:.2f}",
                f"{times['cut']['median']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{low:.2f} to {high:.2f}",
                f"{after / before:.1%}",
                f"{row['proof']:.0e}",
            ]
        )
    head = ["network", "target", "widths", "multiples of", "batch", "dense, ms", "cut, ms"]
    head += ["speed-up", "95 % range", "parameters", "error"]
    text = (
        "Networks with random weights, whole and cut, in turn in one process in stock ONNX Runtime "
        f"{study['versions'].get('onnxruntime', '')}, float32, {study['result']['ort_threads']} "
        "thread(s), on the same input. Of several races the one counts in which the dense network was "
        "fastest. Networks cut to a latency target were exported and raced anew: what the run said of "
        "itself does not count. Error is the largest relative difference to the masked network."
    )
    parts = [prose(text), where(study), table(head, rows), goals(study)]
    return section("Cut networks in stock ONNX Runtime", parts)


def _filters(folder: Path) -> str:
    parts = []
    for study in variants(folder, "filters"):
        plan, rows = study["result"]["plan"], []
        for row in study["result"]["networks"]:
            cells = [row["network"], each(row["accuracy"], ".2f")]
            cells += [each(row[f"percent_fewer_{c}seconds"], ".1f") for c in ("", "processor_")]
            if row["network"] == "dense":
                rows.append([*cells, "", "", ""])
                continue
            gap = row["points_above_dense"]
            left = [100 * after / before for before, after in row["macs"]]
            spent = [100 * share for share in row["training_macs_share"]]
            cells += [each(left, ".1f"), each(spent, ".1f")]
            rows.append([*cells, f"{0 - gap['mean']:.2f} ± {gap['standard_error_of_images']:.2f}"])
        told = (
            f"ResNet-{plan['depth']} on CIFAR-10: {plan['train_images']:,} training and "
            f"{plan['test_images']:,} test images, {plan['recipe']['epochs']} epochs, widths in "
            f"multiples of {plan['align']}; {seeds(study)}."
        )
        head = [f"ResNet-{plan['depth']}", "accuracy, %", "less wall time, %"]
        head += ["less processor time, %", "multiply-adds left, %", "spent in training, %"]
        head.append("points below dense")
        parts += [prose(told), where(study), table(head, rows), goals(study)]
    if not parts:
        return ""
    text = (
        "Filters go while the network trains, down to half of the multiply-adds, against the same "
        "training without removal: `filters` takes the same share of every layer, `iplt` ranks over all "
        "layers. The three networks of a seed take turns in one process, epoch by epoch, with the same "
        "batches and learning rates. One number a seed; the standard error is that of the images."
    )
    return section("Filters removed while training", [prose(text), *parts])


def _dsp(folder: Path) -> str:
    parts = []
    for study in variants(folder, "dsp"):
        result = study["result"]
        plan, times = result["plan"], result["milliseconds_of_100_images"]
        rows = []
        for row in result["networks"]:
            kind, share = row["network"], [100 * x for x in row["macs_share"]]
            cells = [kind, each(row["accuracy"], ".2f"), each(share, ".1f")]
            rows.append([*cells, each((t[kind] for t in times), ".1f")])
        cells = ["groups, as branches", "", "", each((t["branches"] for t in times), ".1f")]
        rows.append(cells)
        kept = statistics.mean(b["parameters"][1] / b["parameters"][0] for b in result["branches"])
        error = max(b["error"] for b in result["branches"])
        told = (
            f"ResNet-20 on CIFAR-10: {plan['train_images']:,} training and "
            f"{plan['test_images']:,} test images, {plan['groups']} groups a convolution, asked to lose "
            f"{plan['target']:.0%} of the multiply-adds of the convolutions, {plan['first']['epochs']} "
            f"and {plan['second']['epochs']} epochs; {seeds(study)}. As branches, the network with "
            f"groups has {kept:.1%} of its parameters and differs by at most {error:.0e}."
        )
        head = ["ResNet-20", "accuracy, %", "multiply-adds left, %", "100 images, ms"]
        parts += [prose(told), where(study), table(head, rows), differences(result["differences"])]
        parts.append(goals(study))
    if not parts:
        return ""
    text = (
        "Input channels go from learned groups of filters, against whole filters down to the same "
        "multiply-adds and against no pruning. All three go on from one trained network, with the same "
        "batches and epochs. One number a seed; the standard error is that of the images."
    )
    return section("Dynamic structure pruning", [prose(text), *parts])


SECTIONS = (_coverage, _compensation, _recovered, _structural, _filters, _dsp)
