"""Train residual networks on a processor, and take up again where a run was cut off."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import cifar
from secateur.core.atomic import new_file
from secateur.learn import Distill, Task
from secateur.learn.objectives import Term


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. The same for every arm of a study.

    Attributes:
        epochs: Passes over the images.
        batch: Images a step.
        rate: Highest learning rate: reached linearly over the warm-up, then a half cosine to 0.
        warmup: Epochs of warm-up.
        decay: Weight decay, of all parameters.
        momentum: Nesterov's.
        earlier: Epochs that were trained before. Their orders and shifts are not used again.
    """

    epochs: int = 30
    batch: int = 128
    rate: float = 0.2
    warmup: float = 2.0
    decay: float = 5e-4
    momentum: float = 0.9
    earlier: int = 0

    def rate_at(self, epoch: float) -> float:
        """Learning rate after so many epochs, whole or not.

        Example:
            >>> r = Recipe()
            >>> r.rate_at(1), r.rate_at(2), r.rate_at(16), round(r.rate_at(30), 9)
            (0.1, 0.2, 0.1, 0.0)
        """
        if epoch < self.warmup:
            return self.rate * epoch / self.warmup
        done = (epoch - self.warmup) / (self.epochs - self.warmup)
        return round(self.rate * (1 + math.cos(math.pi * done)) / 2, 12)


@dataclass
class Run:
    """A network in training.

    Attributes:
        model: The network, changed by training.
        optimizer: Its optimizer.
        recipe: How it is trained.
        history: What happened, one entry an epoch.
    """

    model: nn.Module
    optimizer: torch.optim.SGD
    recipe: Recipe
    history: list[dict[str, Any]]


def start(recipe: Recipe, *, seed: int, depth: int = 20) -> Run:
    """Make an untrained network and its optimizer; the seed decides its first weights."""
    torch.manual_seed(seed)
    return go_on(cifar.ResNet(depth).to(memory_format=torch.channels_last), recipe)


def go_on(model: nn.Module, recipe: Recipe) -> Run:
    """Train a network that is there, with a new optimizer without momenta."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=recipe.momentum,
        weight_decay=recipe.decay,
        nesterov=True,
    )
    return Run(model, optimizer, recipe, [])


def train_epoch(
    run: Run,
    images: cifar.Augmented,
    *,
    seed: int,
    after_step: Callable[[], object] = lambda: None,
    terms: Sequence[Term] = (Task(),),
) -> None:
    """Train one more epoch and add it to the history.

    Args:
        run: What to train.
        images: To train on.
        seed: Of order and augmentation.
        after_step: Called after every step of the optimizer.
        terms: The loss is their sum.
    """
    began, done, losses, right = time.time(), len(run.history), 0.0, 0
    run.model.train()
    for step, (x, labels) in enumerate(images.epoch(run.recipe.earlier + done, seed=seed)):
        for group in run.optimizer.param_groups:
            group["lr"] = run.recipe.rate_at(done + step / len(images))
        with autocast():
            found = run.model(x).float()
            loss = torch.stack([term.of(run.model, found, (x, labels)) for term in terms]).sum()
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        after_step()
        losses += loss.item()
        right += int((found.argmax(1) == labels).sum())
    seconds = time.time() - began
    count = len(images) * images.batch
    run.history.append(
        {
            "epoch": done + 1,
            "loss": round(losses / len(images), 4),
            "train_accuracy": round(100 * right / count, 2),
            "rate_at_end": run.recipe.rate_at(done + 1),
            "seconds": round(seconds, 1),
            "images_a_second": round(count / seconds, 1),
            "bfloat16": bfloat16(),
        }
    )


def bfloat16() -> bool:
    """Whether this processor has vectors for it.

    With AVX2 alone, PyTorch computes a convolution in bfloat16 thirteen times as slowly as in float32.
    """
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bw") or has.get("avx_ne_convert"))


def autocast() -> torch.autocast:
    """Compute forward passes in bfloat16, where that is no detour."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16())


def distilled(teacher: nn.Module, weight: float, *, temperature: float) -> tuple[Term, ...]:
    """Terms of a loss: towards a trained network by a share ``weight``, else towards the labels."""
    return Task(1 - weight), Distill(teacher.eval(), weight, temperature)


def save(run: Run, path: Path, *, more: dict[str, Tensor] | None = None) -> None:
    """Write all that is needed to go on, whole or not at all.

    Args:
        run: To write.
        path: A safetensors file.
        more: Further tensors, given back by :func:`load`.
    """
    tensors = {f"model/{n}": t for n, t in run.model.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        momentum = run.optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum/{name}"] = momentum
    tensors |= {f"more/{n}": t for n, t in (more or {}).items()}
    facts = {"history": run.history, "recipe": asdict(run.recipe)}
    with new_file(path) as temporary:
        save_file(
            {n: t.detach().contiguous() for n, t in tensors.items()},
            temporary,
            metadata={"run": json.dumps(facts)},
        )


def load(run: Run, path: Path) -> dict[str, Tensor]:
    """Take up what :func:`save` wrote, in place of a run just started.

    Returns:
        What was given as ``more``.

    Raises:
        ValueError: The file is from another recipe.
    """
    with safe_open(path, "pt") as stored:
        facts = json.loads(stored.metadata()["run"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if facts["recipe"] != asdict(run.recipe):
        raise ValueError(
            f"Taking up {path.name}: it was trained with {facts['recipe']}, and now "
            f"{asdict(run.recipe)} is asked for. Remove the file to start again."
        )

    def part(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}/"
        return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

    run.model.load_state_dict(part("model"))
    momentum = part("momentum")
    for name, parameter in run.model.named_parameters():
        if name in momentum:
            kept = torch.empty_like(parameter).copy_(momentum[name])
            run.optimizer.state[parameter]["momentum_buffer"] = kept
    run.history[:] = facts["history"]
    return part("more")
