"""Sections about training with masks: its cost, sparse training, tickets, LEAP, perturbations."""

from __future__ import annotations

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


def _overhead(folder: Path) -> str:
    study = read(folder, "overhead")
    if not study:
        return ""
    plan, rows = study["result"]["plan"], []
    for name, row in study["result"]["rows"].items():
        cells = [name, f"{row['percent']:+.2f} %"]
        if "frequency" in row:
            rows.append([f"{name}, one exchange in {row['frequency']} steps", cells[1], *[""] * 4])
            continue
        low, high = row["interval"]
        cells += [f"{low:+.2f} to {high:+.2f}", f"{row['plain_ms']:.1f}"]
        rows.append([*cells, f"{row['pruned_ms']:.1f}", str(row["pairs"])])
    # Before there was a choice, all was in bfloat16.
    half = "bfloat16 autocast" if study["result"].get("bfloat16", True) else "float32"
    text = (
        f"ResNet-{plan['depth']} in {half}, {plan['batch']} images a step, "
        f"{study['result']['sparsity']:.0%} sparsity. Every pair is one step without and one with a "
        "pruner, in alternating order; the percent is the median over pairs, in processor time, with "
        "its 95 % interval."
    )
    head = ["step", "longer by", "95 % interval", "without, ms", "with, ms", "pairs"]
    parts = [prose(text), where(study), table(head, rows), goals(study)]
    return section("What a pruner adds to a training step", parts)


def _sparse_training(folder: Path) -> str:
    parts = []
    for study in variants(folder, "sparse_training"):
        result = study["result"]
        plan = result["plan"]
        rows = [
            [
                arm["arm"],
                f"{arm['mean']:.2f} %",
                f"{arm['least']:.2f} to {arm['most']:.2f}",
                f"{arm['sparsity_of_pruned_weights']:.1%}",
                f"{arm['sparsity_of_whole_model']:.1%}",
                f"{arm['seconds']:,.0f} s",
            ]
            for arm in result["arms"]
        ]
        told = (
            f"ResNet-{plan['depth']} on CIFAR-10: {plan['train_images']:,} training and "
            f"{plan['test_images']:,} test images, {plan['recipe']['epochs']} epochs, masks change "
            f"every {plan['every']} steps; {seeds(study)}."
        )
        head = [f"ResNet-{plan['depth']}", "accuracy", "range over seeds"]
        head += ["sparsity of pruned weights", "of the whole model", "training"]
        parts += [prose(told), where(study), table(head, rows)]
        parts += [differences(result["differences"]), goals(study)]
    if not parts:
        return ""
    text = (
        "Every arm trains from the same first weights, with the same batches, epochs and learning "
        "rates: dense; a random mask that is held; SET and RigL from that mask; AC/DC; gradual magnitude "
        "pruning. Differences are counted image by image between arms of one seed; the standard error "
        "is that of the images."
    )
    return section("Sparse training", [prose(text), *parts])


def _tickets(folder: Path) -> str:
    study = read(folder, "tickets")
    if not study:
        return ""
    result = study["result"]
    plan, levels = result["plan"], result["levels"]
    methods = list(levels[0]["accuracy"])
    rows = [
        [
            method,
            *(f"{level['accuracy'][method]:.2f}" for level in levels),
            _at_the_end(result["arms"], method, study["seeds"]),
        ]
        for method in methods
    ]
    text = (
        f"ResNet-{plan['depth']} on CIFAR-10: {plan['train_images']:,} training and "
        f"{plan['test_images']:,} test images, {plan['training']['epochs']} epochs for the dense network "
        f"and for each level. After pruning by magnitude the learning rate goes back, the weights go "
        f"back to epoch {plan['rewind_to']:g}, the last rate goes on, or weights are drawn anew. "
        f"Accuracy in %, mean of {seeds(study)} (standard error {result['standard_error']:.2f} points "
        f"each, of the images). Dense: {each(result['dense'], '.2f')}. The file has the likeness of the "
        "masks and their empty filters, channels and kernels."
    )
    head = ["what happens to the survivors", *(f"{level['sparsity']:.0%}" for level in levels)]
    head.append(f"{levels[-1]['sparsity']:.0%}, by seed")
    parts = [prose(text), where(study), table(head, rows), goals(study)]
    return section("Lottery tickets", parts)


def _at_the_end(arms: list[dict[str, Any]], method: str, own: list[int]) -> str:
    """Accuracy at the last level, seed by seed."""
    by = {(arm["method"], arm["seed"]): arm["levels"][-1]["accuracy"] for arm in arms}
    return each((by[method, seed] for seed in own), ".2f")


def _leap(folder: Path) -> str:
    study = read(folder, "leap")
    if not study:
        return ""
    result = study["result"]
    plan = result["plan"]
    rows = [
        [
            f"{arm['target']:.0%}",
            {"element": "single weights", "row": "rows"}[arm["grain"]],
            {"one-shot": "magnitude at once", "trained": "magnitude, trained"}.get(
                arm["kind"], arm["kind"]
            ),
            f"{arm['sparsity']:.2%}",
            f"{arm['accuracy']:.2f} %",
        ]
        for arm in result["arms"]
    ]
    text = (
        f"MiniLM fine-tuned on {plan['sentences']:,} sentences of SST-2; the encoder's matrices are "
        f"pruned, {plan['pruning']['epochs']:g} epoch(s) of {plan['arm_sentences']:,} sentences with "
        "distillation from the teacher, but for magnitude at once, which is not trained. Accuracy on "
        f"{plan['test']:,} test sentences, {seeds(study)}. Teacher: {result['teacher_accuracy']:.2f} %."
    )
    head = ["asked", "what goes", "method", "sparsity", "accuracy"]
    parts = [prose(text), where(study), table(head, rows), goals(study)]
    return section("LEAP on a Transformer", parts)


def _adversarial(folder: Path) -> str:
    study = read(folder, "adversarial")
    if not study:
        return ""
    result = study["result"]
    plan, attacks = result["plan"], list(result["arms"][0]["curves"])
    largest = max(plan["sizes"])
    rows = []
    for arm in result["arms"]:
        curves = [arm["curves"][name] for name in attacks]
        found = [arm["natural"], *(c["area"] for c in curves), *(c["accuracy"][-1] for c in curves)]
        cells = [arm["way"], f"{arm['target']:.0%}", f"{arm['sparsity']:.2%}"]
        rows.append([*cells, *(f"{100 * x:.1f}" for x in found)])
    text = (
        f"A small convolutional network on Fashion-MNIST: {plan['images']:,} training and "
        f"{plan['test']:,} test images, a dense trunk of {plan['trunk']:g} epoch(s) for each way of "
        f"training, then {plan['arm']:g} for every arm, pruned by magnitude over the first half; "
        f"{seeds(study)}. FGSM and PGD train at {result['eps']:g}; `blind` trains with DeepFool and a "
        "cut-off, at no fixed size. Accuracy in %; the mean is over perturbations from 0 to "
        f"{largest:g} of the pixels' range."
    )
    head = ["training", "asked", "sparsity", "natural", *(f"mean, {n.upper()}" for n in attacks)]
    head += [f"{name.upper()} at {largest:g}" for name in attacks]
    parts = [prose(text), where(study), table(head, rows), goals(study)]
    return section("Blind adversarial pruning", parts)


SECTIONS = (_overhead, _sparse_training, _tickets, _leap, _adversarial)
