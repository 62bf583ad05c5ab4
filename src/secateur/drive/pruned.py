"""The result of a run: the model, its masks, and the facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from secateur.core.arguments import require_network
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.core.slots import bare
from secateur.formats import Surgery, read_bundle, write_bundle
from secateur.frontends.surgery import load_bundle_


@dataclass(frozen=True)
class Pruned:
    """A pruned model with the proof of what was done.

    Args:
        model: The pruned network; pruned weights are exactly zero, nothing else is attached.
        masks: Which weights were kept.
        facts: What happened, per weight and in all.
        surgery: What was cut, if anything was; see :func:`~secateur.frontends.surgery.surgery_for`.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> Pruned(net, Masks({}), Facts()).facts.layers
        []
    """

    model: nn.Module
    masks: Masks
    facts: Facts
    surgery: Surgery | None = None

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the bundle; the folder appears whole or not at all.

        It holds ``model.safetensors`` (sparse weights stored sparse), ``recipe.yaml``,
        ``facts.json``, and ``surgery.json`` if the network was cut.

        Raises:
            OutputExists: The folder exists and ``overwrite`` is false.
        """
        write_bundle(
            folder,
            self.model.state_dict(),
            self.masks,
            recipe=self.facts.recipe,
            facts=self.facts,
            surgery=self.surgery,
            overwrite=overwrite,
        )
        return Path(folder)


def load(model: nn.Module, folder: str | Path, *, check_weights: bool = False) -> Pruned:
    """Restore a bundle into a freshly built ``model`` (in place), exactly.

    A network that was cut is cut again first, as ``surgery.json`` says: ``model`` is the original
    one. Classes, names, shapes and types are checked before anything is changed.

    Args:
        model: The architecture that the bundle was made from. Its values do not matter. Of a compiled
            one, or one in data parallelism, the network inside.
        folder: The bundle.
        check_weights: Require that ``model`` has the very weights that were cut (their hash is in
            ``surgery.json``). A freshly built model has others.

    Raises:
        FormatError: A file of the bundle is damaged.
        UsageError: The bundle belongs to another model; nothing was changed.

    Example:
        >>> import tempfile, torch, secateur
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pruned = secateur.prune(net, secateur.recipes.magnitude(0.5))
        >>> folder = pruned.save(tempfile.mkdtemp() + "/out")
        >>> fresh = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> restored = secateur.load(fresh, folder)
        >>> torch.equal(restored.model[0].weight, pruned.model[0].weight)
        True
    """
    require_network("loading a bundle into a model", model)
    model = bare(model)
    bundle = read_bundle(folder)
    load_bundle_(model, bundle, check_weights=check_weights)
    return Pruned(model, bundle.masks, bundle.facts, bundle.surgery)
