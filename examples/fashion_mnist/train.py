"""Train the example's network from scratch on the shipped training images.

    python train.py --threads 2

Writes `weights.safetensors`, and beside it `weights.json`: what was done and what came out. The
weights are those after the last epoch. None is chosen by its accuracy on the test images, which
are looked at once, at the end.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import loaders
from network import build
from safetensors.torch import save_file
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train; the numbers that matter for the result.

    Attributes:
        epochs: Passes over the training images.
        batch: Images in a step.
        rate: Highest learning rate: reached after a fifth of the steps, zero at the end.
        decay: Weight decay, on convolution and linear weights only.
        smoothing: Of the labels.
        erase: Side of the square that is blanked, in half of the images.
        seed: Of the initial weights, the order and the augmentation.
    """

    epochs: int
    seed: int
    batch: int = 128
    rate: float = 0.2
    decay: float = 1e-3
    smoothing: float = 0.1
    erase: int = 10


def erase_(images: Tensor, side: int) -> None:
    """Set a square to the mean grey (zero, after normalising), in about half of the images.

    With 3,500 images of a class, the network would otherwise learn them by heart. The square's
    centre is anywhere in the image, so it may be cut off at the border.
    """
    count, _, height, width = images.shape
    row, column = torch.randint(height, (2, count, 1))
    inside_rows = (torch.arange(height) - row).abs() * 2 < side
    inside_columns = (torch.arange(width) - column).abs() * 2 < side
    square = inside_rows[:, :, None] & inside_columns[:, None, :]
    chosen = torch.rand(count) < 0.5
    images.masked_fill_((square & chosen[:, None, None]).unsqueeze(1), 0.0)


def optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Make SGD that leaves norms and biases without decay: shrinking them only costs accuracy."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=recipe.rate, momentum=0.9, nesterov=True)


def train_(model: nn.Module, recipe: Recipe) -> None:
    """Train the model in place, printing a line an epoch.

    Forward passes run in bfloat16 (weights stay float32): with channels-last, this was 1.7 times
    as fast as float32 on a processor with AVX512-BF16, at the same accuracy.
    """
    batches = loaders(batch=recipe.batch, seed=recipe.seed)["train"]
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    sgd = optimiser(model, recipe)
    steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, recipe.rate, total_steps=steps + 1, pct_start=0.2, cycle_momentum=False
    )
    model.train()
    for epoch in range(recipe.epochs):
        began, total, right, seen = time.perf_counter(), 0.0, 0, 0
        for images, labels in batches:
            erase_(images, recipe.erase)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = loss_of(logits.float(), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
            total += loss.item() * len(labels)
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        seconds = time.perf_counter() - began
        print(
            f"epoch {epoch + 1:3d}  loss {total / seen:.4f}  train {right / seen:.4f}  "
            f"{seconds:.1f} s  {seen / seconds:.0f} images/s",
            flush=True,
        )


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Give the fraction of images classified right, in float32 and evaluation mode."""
    model.eval()
    right = seen = 0
    with torch.inference_mode():
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
            seen += len(labels)
    return right / seen


def save_(model: nn.Module, facts: dict[str, Any], path: Path) -> None:
    """Write weights and facts, each whole or not at all.

    Tensors are stored row by row, so that the file does not depend on the memory format used in
    training.
    """
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    temporary = path.with_name(path.name + ".part")
    save_file(state, temporary)
    temporary.replace(path)
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path.with_suffix(".json"))


def main() -> None:
    """Train, measure once, save."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Train the Fashion-MNIST example network.")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch likes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation")
    parser.add_argument("--out", type=Path, default=here / "weights.safetensors")
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = Recipe(epochs=arguments.epochs, seed=arguments.seed)
    torch.manual_seed(recipe.seed)
    model = build()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub
    began = time.perf_counter()
    train_(model, recipe)
    seconds = time.perf_counter() - began
    test = loaders()["test"]
    found = accuracy(model, test)
    print(f"test accuracy {found:.4f} after {seconds:.0f} s")
    facts = {
        "test_accuracy": found,
        "test_images": len(test.labels),
        "chosen_by": "last epoch",
        **{name: getattr(recipe, name) for name in Recipe.__slots__},
        "training_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    save_(model, facts, arguments.out)


if __name__ == "__main__":
    main()
