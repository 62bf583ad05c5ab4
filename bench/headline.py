"""The figures that README shows, from the files in ``results``: ``python -m bench.headline``."""

from __future__ import annotations

from pathlib import Path

from bench.markdown import prose, read, table
from bench.record import RESULTS

THREADS = 2
# Network as the results and as README name it, and the sparsity.
COMPILED = (
    ("bert-base", "BERT-base, 128 tokens", 0.9),
    ("minilm-l6", "MiniLM-L6, 128 tokens", 0.9),
    ("resnet50", "ResNet-50", 0.9),
    ("mobilenetv2", "MobileNetV2", 0.9),
)
CUT = (
    ("resnet50", "ResNet-50", "macs=50%"),
    ("resnet50", "ResNet-50", "latency=2x"),
    ("mobilenetv2", "MobileNetV2", "latency=1.5x"),
)
ONE_SHOT = "sweep + asymmetric least squares"  # as the study names it


def text(folder: Path = RESULTS) -> str:
    """Two tables, of speed and of accuracy, with what is needed to read them."""
    machines = [read(folder, study)["machine"] for study in ("speed", "structural")]
    where = dict.fromkeys(f"{m['processor']}, {m['instructions']}" for m in machines)
    about = (
        f"Against the dense network in ONNX Runtime, in turn with it: float32, one sample, {THREADS} "
        f"threads, {'; '.join(where)}. Most of these networks have random weights: the figures are about "
        "speed alone."
    )
    accuracy = (
        "Accuracy, of trained networks on images of CIFAR-10 that they have not seen (± is the standard "
        "error of the difference):"
    )
    end = (
        "All figures, with the goals that were missed, are in [bench/README.md](bench/README.md); "
        "`make bench` measures them on your machine."
    )
    faster = table(
        ["network", "what was done", "faster", "smaller"], _compiled(folder) + _cut(folder)
    )
    kept = table(["network", "what was done", "dense", "pruned"], _accuracies(folder))
    return "\n".join([prose(about), faster, prose(accuracy), kept, prose(end)])


def _compiled(folder: Path) -> list[list[str]]:
    rows = {
        (case["network"], case["sparsity"]): row
        for row in read(folder, "speed")["result"]["rows"]
        if ((case := row["case"])["threads"], case["batch"], case["isa"]) == (THREADS, 1, "")
    }
    return [
        [
            shown,
            f"{sparsity:.0%} zeros, `secateur compile`",
            f"{rows[network, sparsity]['speedup']:.2f}x",
            f"{rows[network, sparsity]['dense_bytes'] / rows[network, sparsity]['sparse_bytes']:.1f}x",
        ]
        for network, shown, sparsity in COMPILED
    ]


def _cut(folder: Path) -> list[list[str]]:
    rows = {
        (row["network"], row["target"]): row
        for row in read(folder, "structural")["result"]["rows"]
        if (row["allocation"], row.get("asked_align", 0), row["batch"]) == ("ranked", 0, 1)
    }
    found = []
    for network, shown, target in CUT:
        before, after = rows[network, target]["parameters"]
        speed = f"{rows[network, target]['speedup']:.2f}x"
        found.append(
            [shown, f"`secateur shrink --target {target}`", speed, f"{before / after:.1f}x"]
        )
    return found


def _accuracies(folder: Path) -> list[list[str]]:
    one_shot = read(folder, "oneshot-resnet20")["result"]
    (swept,) = (
        row
        for row in one_shot["rows"]
        if (row["method"], row["allocation"], row["target"]) == (ONE_SHOT, "uniform", 0.7)
    )
    arms = {arm["arm"]: arm for arm in read(folder, "gradual")["result"]["arms"]}
    tuned = read(folder, "recovered-resnet56-held-out")["result"]
    accuracy = {kind: found["test"]["accuracy"] for kind, found in tuned["networks"].items()}
    recovered = tuned["differences"]["distilled"]["standard_error_of_images"]
    epochs = tuned["plan"]["recipe"]["epochs"]
    return [
        [
            "ResNet-20",
            "70% zeros at once, columns swept and refitted, no training",
            f"{one_shot['dense']['accuracy']:.1f}%",
            f"{swept['accuracy']:.1f}%",
        ],
        [
            "ResNet-20",
            "90% zeros, gradually, dense trained as long",
            f"{arms['dense']['accuracy']:.1f}%",
            f"{arms['0.9']['accuracy']:.1f}% ± {arms['0.9']['drop_standard_error']:.1f}",
        ],
        [
            "ResNet-56",
            f"half of the multiply-adds removed, {epochs} epochs of fine-tuning, distilled; dense likewise",
            f"{accuracy['dense']:.1f}%",
            f"{accuracy['distilled']:.1f}% ± {recovered:.1f}",
        ],
    ]


if __name__ == "__main__":
    print(text())
