"""Lottery tickets: train, prune, rewind, train again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from secateur.core.arguments import require_kind, require_place
from secateur.core.batches import as_data
from secateur.drive.pruned import Pruned, load
from secateur.drive.recipe import Recipe, require_recipe
from secateur.drive.training.finetune import Progress
from secateur.experiments.terms import TicketPlan
from secateur.experiments.ticket_facts import StageFacts, TicketFacts
from secateur.experiments.ticket_search import Network, Search, reset_, restart_

__all__ = ["StageFacts", "TicketFacts", "find_ticket", "load_ticket", "reset_", "restart_"]


def find_ticket(
    model: Network,
    recipe: Recipe | None = None,
    data: Any = None,
    *,
    folder: str | Path,
    plan: TicketPlan | None = None,
    progress: Progress | None = None,
) -> TicketFacts:
    r"""Train, prune, rewind and train again, level after level.

    Every stage (the dense training, each level) is written below ``folder`` and returns at once if
    it is there. A run that was killed goes on with the stage that it was in; what it ends with is
    bit for bit what the uninterrupted run ends with, on the CPU, because each epoch of each stage
    has a seed of its own. Data that draws its order or augmentation from elsewhere than PyTorch,
    Python, NumPy or the loader's own generator cannot be repeated.

    The dense training has a folder of its own, shared by all runs that train alike.

    **formula** :math:`w \leftarrow m_l \odot w_k` (weights), :math:`m_l \odot w_T` (rate, fine-tune)
    or :math:`m_l \odot w'_0` (reinit), then steps :math:`k..T` of the schedule; :math:`m_l \le m_{l-1}`
    **Shapes** those of the weights
    **Units** none
    **Needs** training batches, and what the criterion needs
    **Source** Frankle and Carbin, arXiv 1803.03635; rewinding to k: arXiv 1903.01611; learning-rate
    rewinding: Renda et al., arXiv 2003.02389; masks: Paganini and Forde, arXiv 2001.05050
    **Differs** final classifier and first convolution stay dense unless the recipe's scope says
    otherwise (the first paper prunes the classifier half as fast)

    Args:
        model: A network, or a function that builds one. The network itself is not changed.
        recipe: Criterion, pattern, allocation and scope; its target is the last level unless the
            plan names the levels.
        data: Training batches, and test batches to measure on.
        folder: The runs' folder, for these data: stages that were trained on others are not recognised.
        plan: Levels, rewinding and training.
        progress: Called with a stage, the work done and the whole.

    Raises:
        UsageError: The recipe, plan or network do not fit; nothing was written.
        FormatError: A finished stage was altered.
        DataError: The loss became NaN; finished stages are kept.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from secateur.experiments import TicketPlan, Training
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> batch = (x, (x.sum(1) > 0).long())
        >>> def net():
        ...     wide = nn.Linear(16, 16)
        ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), wide, nn.ReLU(), nn.Linear(16, 2))
        >>> plan = TicketPlan(levels=(0.5, 0.75), training=Training(epochs=2))
        >>> found = find_ticket(net, None, {"train": [batch], "test": [batch]},
        ...                     folder=tempfile.mkdtemp(), plan=plan)
        >>> [round(stage.sparsity, 2) for stage in found.levels]
        [0.5, 0.75]
    """
    require_recipe(recipe)
    require_place("find_ticket(folder=...)", folder)
    kinds, write = (TicketPlan, type(None)), "e.g. TicketPlan(rewind='rate')"
    require_kind("find_ticket(plan=...)", plan, kinds, what="a TicketPlan", write=write)
    plan = plan or TicketPlan()
    return Search(model, recipe or Recipe(), as_data(data), Path(folder), plan, progress).run()


def load_ticket(model: nn.Module, level: str | Path) -> Pruned:
    """Restore one level of a run into ``model``, in place: its weights, masks and facts.

    The same as :func:`secateur.load`; here for those who look for it here.

    Example:
        >>> load_ticket(nn.Linear(2, 2), "no-such-folder")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: reading the bundle ...
    """
    return load(model, level)
