"""Published methods: each is an assembly of parts, takes the sparsity and returns a recipe."""

from __future__ import annotations

import dataclasses

from secateur.allocate import ErdosRenyi, Ranked, Uniform
from secateur.core.budget import Target
from secateur.drive.recipe import Recipe
from secateur.drive.training.finetune import FineTune
from secateur.drive.training.regrow import Regrow, TopKast
from secateur.pattern import NM, Elements, Pattern, PerRow
from secateur.recover import ColumnSweep, ExactObs, FisherUpdate
from secateur.schedule import Alternating, Exponential, OneShot, Polynomial, Schedule
from secateur.score import (
    Grasp,
    Lamp,
    Lookahead,
    Magnitude,
    Movement,
    Obd,
    ObsSaliency,
    Random,
    Ria,
    Snip,
    SynFlow,
    Wanda,
    WoodFisher,
)


def magnitude(sparsity: float = 0.5) -> Recipe:
    """Magnitude, the same sparsity in every layer (Han et al., arXiv 1506.02626)."""
    return Recipe(Magnitude(), target=Target("sparsity", sparsity))


def gmp(sparsity: float = 0.9, epochs: float = 10) -> Recipe:
    """Gradual magnitude pruning with fine-tuning (Zhu and Gupta, arXiv 1710.01878).

    The window follows "Pruning for success": prune over the first half of the epochs, hold the mask
    and fine-tune for the rest. All weights are ranked together; the paper prunes every layer to the
    same sparsity, which is ``allocation=Uniform()``.
    """
    return Recipe(
        Magnitude(),
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=window(epochs),
        recovery=(FineTune(epochs=epochs),),
    )


def window(epochs: float) -> Schedule:
    """The default pruning window: cubic, over the first half of the epochs, in fifty updates."""
    return Polynomial(begin=0, end=epochs / 2, frequency=epochs / 100, unit="epochs")


def wanda(sparsity: float = 0.5) -> Recipe:
    """Weights times input norms, compared within rows (arXiv 2306.11695).

    Every layer sees the inputs that all pruned layers before it leave; the authors' code measures once
    a block, before any layer of the block is pruned.
    """
    return Recipe(Wanda(), PerRow(), Target("sparsity", sparsity), sequential=True)


def ria(sparsity: float = 0.5) -> Recipe:
    """Relative importance and activations, compared within each layer (ICLR 2024).

    Measured layer by layer, as :func:`wanda` is.
    """
    return Recipe(Ria(), Elements(), Target("sparsity", sparsity), sequential=True)


def sparsegpt(sparsity: float = 0.5, pattern: Pattern | None = None) -> Recipe:
    """Optimal-brain column sweep, layer after layer (arXiv 2301.00774).

    Measured layer by layer, as :func:`wanda` is.
    """
    pattern = pattern or Elements()
    target = None if isinstance(pattern, NM) else Target("sparsity", sparsity)
    return Recipe(ObsSaliency(), pattern, target, recovery=(ColumnSweep(),), sequential=True)


def obc(sparsity: float = 0.5) -> Recipe:
    """Exact optimal brain compression with dense activations (arXiv 2208.11580)."""
    return Recipe(ObsSaliency(), Elements(), Target("sparsity", sparsity), recovery=(ExactObs(),))


def snip(sparsity: float = 0.9) -> Recipe:
    """Connection sensitivity, ranked globally (arXiv 1810.02340)."""
    return Recipe(Snip(), target=Target("sparsity", sparsity), allocation=Ranked())


def grasp(sparsity: float = 0.9) -> Recipe:
    """Gradient signal preservation, ranked globally (arXiv 2002.07376)."""
    return Recipe(Grasp(), target=Target("sparsity", sparsity), allocation=Ranked())


def synflow(sparsity: float = 0.9, rounds: int = 100) -> Recipe:
    """Iterative synaptic flow, ranked globally (arXiv 2006.05467)."""
    schedule = Exponential(begin=0, end=rounds) if rounds > 1 else OneShot()
    return Recipe(
        SynFlow(), target=Target("sparsity", sparsity), allocation=Ranked(), schedule=schedule
    )


def lamp(sparsity: float = 0.9) -> Recipe:
    """Layer-adaptive magnitude (arXiv 2010.07611)."""
    return Recipe(Lamp(Magnitude()), target=Target("sparsity", sparsity), allocation=Ranked())


def lap(sparsity: float = 0.9) -> Recipe:
    """Lookahead pruning, the same sparsity in every layer (arXiv 2002.04809)."""
    return Recipe(Lookahead(), target=Target("sparsity", sparsity))


def erk_magnitude(sparsity: float = 0.9) -> Recipe:
    """Magnitude with Erdős-Rényi-kernel layer densities (arXiv 1911.11134)."""
    return Recipe(Magnitude(), target=Target("sparsity", sparsity), allocation=ErdosRenyi())


def woodfisher(sparsity: float = 0.9, rounds: int = 4) -> Recipe:
    """Block Fisher saliency, ranked globally, in rounds, with its update (arXiv 2004.14340)."""
    return Recipe(
        WoodFisher(),
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=Exponential(begin=0, end=rounds) if rounds > 1 else OneShot(),
        recovery=(FisherUpdate(),),
    )


def obd(sparsity: float = 0.9) -> Recipe:
    """Damped diagonal Fisher saliency, ranked globally (LeCun et al. 1989)."""
    return Recipe(Obd(), target=Target("sparsity", sparsity), allocation=Ranked())


def movement(sparsity: float = 0.9, epochs: float = 6) -> Recipe:
    """Movement pruning while fine-tuning, ranked globally (arXiv 2005.07683).

    The authors' code keeps the same share of every matrix, which is ``allocation=Uniform()``.
    """
    return Recipe(
        Movement(),
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=window(epochs),
        recovery=(FineTune(epochs=epochs, optimizer="adamw", lr=3e-5),),
    )


def rigl(sparsity: float = 0.9, epochs: float = 10, pattern: Pattern | None = None) -> Recipe:
    """Sparse from a random start, grown by dense gradients (RigL, arXiv 1911.11134).

    For networks that are not trained yet: the first mask is random.
    """
    return _sparse(
        sparsity, epochs, Regrow("gradient", frequency=epochs / 50, unit="epochs"), pattern
    )


def set_(sparsity: float = 0.9, epochs: float = 10, pattern: Pattern | None = None) -> Recipe:
    """Sparse from a random start, grown at random (SET, arXiv 1707.04780).

    For networks that are not trained yet. Everything but the growth is as in :func:`rigl`.
    """
    return _sparse(
        sparsity, epochs, Regrow("random", frequency=epochs / 50, unit="epochs"), pattern
    )


def static_sparse(sparsity: float = 0.9, epochs: float = 10) -> Recipe:
    """A random mask at Erdős-Rényi-kernel densities, held: what sparse training must beat."""
    return dataclasses.replace(_sparse(sparsity, epochs, None), criterion=Random())


def topkast(sparsity: float = 0.9, epochs: float = 10, extra: float = 0.1) -> Recipe:
    """Forward with the largest weights, train those and ``extra`` more (arXiv 2106.03517)."""
    regrow = TopKast(extra, frequency=epochs / 50, unit="epochs")
    return dataclasses.replace(_sparse(sparsity, epochs, regrow), allocation=Uniform())


def acdc(sparsity: float = 0.9, epochs: float = 10) -> Recipe:
    """Dense and compressed phases in turn, ranked globally (AC/DC, arXiv 2106.12379).

    As for ImageNet: a dense tenth, phases of a twentieth, a last dense tenth, sparse from 85 % on.
    """
    return Recipe(
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=Alternating(0.05 * epochs, 0.85 * epochs, 0.05 * epochs, "epochs"),
        recovery=(FineTune(epochs=epochs, lr=0.1),),
    )


def _sparse(
    sparsity: float,
    epochs: float,
    regrow: Regrow | TopKast | None,
    pattern: Pattern | None = None,
) -> Recipe:
    """Sparse before the first step, and trained from scratch."""
    pattern = pattern or Elements()
    fixed = isinstance(pattern, NM)
    return Recipe(
        pattern=pattern,
        target=None if fixed else Target("sparsity", sparsity),
        allocation=Uniform() if fixed else ErdosRenyi(),
        schedule=OneShot(unit="epochs"),
        recovery=(FineTune(epochs=epochs, lr=0.1),),
        regrow=regrow,
    )


ALIASES = {
    "magnitude": magnitude,
    "gmp": gmp,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "obc": obc,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    "lamp": lamp,
    "lap": lap,
    "erk_magnitude": erk_magnitude,
    "woodfisher": woodfisher,
    "obd": obd,
    "movement": movement,
    "ria": ria,
    "rigl": rigl,
    "set": set_,
    "static_sparse": static_sparse,
    "topkast": topkast,
    "acdc": acdc,
}
