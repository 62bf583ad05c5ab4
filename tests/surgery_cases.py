"""A network to cut, and what was done to it, in memory and as a bundle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.drive.pruned import Pruned
from secateur.formats import BlockEdit, Surgery, same_bits
from secateur.frontends.surgery import surgery_for
from secateur.structure import apply_, couple, cuts_for

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """A block that can be taken out, with a buffer that is not saved and a size of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.second = nn.Conv2d(2 * width, width, 1, bias=False)
        self.width = width
        self.register_buffer("gain", torch.linspace(1.0, 2.0, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.norm(x)).relu())
        y = y.permute(0, 2, 3, 1).flatten(1).view(len(x), -1, self.width) * self.gain
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Net(nn.Module):
    """Two residual blocks, and an output layer under two names."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.blocks = nn.ModuleList([Residual(width), Residual(width)])
        self.head = nn.Linear(width, 4)
        self.again = nn.Linear(width, 4)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3))
        return self.head(x) + self.again(x)


class Other(Net):
    """The same network under another name."""


def build(seed: int = 0, width: int = 6) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(width).eval()


def cut_net(seed: int = 0, blocks: tuple[BlockEdit, ...] = ()) -> tuple[Net, Surgery]:
    """A cut network, and what was done to it."""
    model = build(seed)
    structure = couple(model, EXAMPLE)
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for width in structure.widths:
        flags = torch.rand(width.groups, generator=generator) > 0.4
        flags[:2] = torch.tensor([True, False])
        keep[width.name] = flags
    cuts = cuts_for(model, structure, keep)
    assert cuts.attributes["blocks.0"]["width"] < 6
    surgery = surgery_for(model, cuts, blocks)
    apply_(model, cuts)
    for block in blocks:
        name = block.module.rpartition(".")[2]
        model.blocks[int(name)] = nn.Identity()
    return model, surgery


def same(a: nn.Module, b: nn.Module) -> bool:
    """All parameters and buffers (saved or not), and all sizes, agree in every bit."""
    left = {**dict(a.named_parameters()), **dict(a.named_buffers())}
    right = {**dict(b.named_parameters()), **dict(b.named_buffers())}
    return (
        left.keys() == right.keys()
        and all(x.shape == right[n].shape and same_bits(x, right[n]) for n, x in left.items())
        and repr(a) == repr(b)
        and [getattr(m, "width", 0) for m in a.modules()]
        == [getattr(m, "width", 0) for m in b.modules()]
    )


def saved(folder: Path, seed: int = 0, blocks: tuple[BlockEdit, ...] = ()) -> tuple[Net, Path]:
    model, surgery = cut_net(seed, blocks)
    masks = Masks({"head.weight": torch.arange(4 * model.head.in_features).reshape(4, -1) % 3 > 0})
    masks.apply_(model)
    return model, Pruned(model, masks, Facts(), surgery).save(folder)
