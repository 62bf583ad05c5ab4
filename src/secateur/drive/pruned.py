"""The result of a run: the model, its masks, and the facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import load_into_, read_bundle, write_bundle


@dataclass(frozen=True)
class Pruned:
    """A pruned model with the proof of what was done.

    Args:
        model: The pruned network; pruned weights are exactly zero, nothing else is attached.
        masks: Which weights were kept.
        facts: What happened, per weight and in all.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> Pruned(net, Masks({}), Facts()).facts.layers
        []
    """

    model: nn.Module
    masks: Masks
    facts: Facts

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the bundle; the folder appears whole or not at all.

        It holds ``model.safetensors`` (sparse weights stored sparse), ``recipe.yaml`` and
        ``facts.json``.

        Raises:
            OutputExists: The folder exists and ``overwrite`` is false.
        """
        write_bundle(
            folder,
            self.model.state_dict(),
            self.masks,
            recipe=self.facts.recipe,
            facts=self.facts,
            overwrite=overwrite,
        )
        return Path(folder)


def load(model: nn.Module, folder: str | Path) -> Pruned:
    """Restore a bundle into a freshly built ``model`` (in place), exactly.

    Names, shapes and types are checked before anything is changed.

    Raises:
        FormatError: A file of the bundle is damaged, or belongs to another model.

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
    bundle = read_bundle(folder)
    load_into_(model, bundle)
    return Pruned(model, bundle.masks, bundle.facts)
