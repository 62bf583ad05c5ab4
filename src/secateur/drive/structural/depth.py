"""Making a network shallower: the blocks that do least are left out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Data, as_data, evaluating, first_of, inputs_of, lack, to_device
from secateur.core.budget import Target
from secateur.core.errors import BudgetError, DataError, NeedsData, UsageError, kind_of
from secateur.core.facts import Facts, environment
from secateur.core.losses import default_loss
from secateur.core.masks import Masks
from secateur.core.slots import device_of
from secateur.drive.money import uses
from secateur.drive.network import copy_of
from secateur.drive.pruned import Pruned
from secateur.drive.structural.latency_budget import TOLERANCE
from secateur.formats import BlockEdit
from secateur.frontends import discover
from secateur.frontends.remembered import remember_
from secateur.frontends.surgery import surgery_for
from secateur.score import BlockInfluence
from secateur.stats import collect
from secateur.structure import Cuts
from secateur.structure.deletion import carry_out_, removal_of
from secateur.structure.depth import Block, blocks_of, bypassed
from secateur.structure.masked import call, compare
from secateur.structure.outputs import predictions

# The same operators on the same weights; kernels may take sums in another order.
_NEAR = 1e-5


@dataclass(frozen=True)
class BlockLoss:
    r"""How much the loss rises when a block is left out; the lowest can go.

    **formula** :math:`L(\text{network without the block}) - L(\text{network})`, the mean over batches
    **Shapes** ``(blocks,)``
    **Units** those of the loss
    **Needs** a forward pass a block, and targets or a loss
    **Source** Shortened LLaMA, arXiv 2402.02834 (there: perplexity)

    Args:
        greedy: Measure again after every removed block, without those that are gone.

    Example:
        >>> BlockLoss().greedy
        False
    """

    greedy: bool = False


def drop_blocks(
    model: nn.Module,
    drop: int | str | Target,
    data: Any = None,
    *,
    criterion: BlockInfluence | BlockLoss = BlockInfluence(()),  # noqa: B008 - a frozen value
    example_inputs: Any = None,
    keep: Sequence[str] = (),
) -> Pruned:
    """Remove whole residual blocks from a copy of ``model``.

    **formula**: the blocks with the lowest scores go. What is left computes what the model computes
    when they return their inputs; this is checked, and ``facts.measures["proof"]`` says how nearly.
    Shapes: those of the network stay.
    Units: blocks, as :func:`~secateur.structure.depth.blocks_of` finds them.
    Needs: batches to measure on.
    Source: ShortGPT, arXiv 2403.03853; Shortened LLaMA, arXiv 2402.02834.

    Args:
        model: Any torch module. It is not changed.
        drop: How many blocks go; or a target such as ``"params=70%"`` or ``"macs=70%"``: blocks go
            until it is met.
        data: Batches, for the criterion; their first is the example by default.
        criterion: :class:`~secateur.score.BlockInfluence` (its paths are filled in here; with
            ``span=n`` the best ``n`` neighbours go) or :class:`BlockLoss`.
        example_inputs: As in :func:`~secateur.drive.structural.shrink.shrink`.
        keep: Paths of blocks that stay.

    Returns:
        The copy, the facts with the score of each block, and the surgery.

    Raises:
        UsageError: There are fewer blocks than are to go (one stays), or ``drop`` is neither a number
            of them nor a target.
        BudgetError: The target cannot be met by removing blocks; the floor is named.
        DataError: The result does not compute what the bypassed network does.

    Example:
        >>> import secateur, transformers
        >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=3, vocab_size=9,
        ...                                  num_attention_heads=2, intermediate_size=4)
        >>> bert = transformers.BertModel(config)
        >>> shallow = drop_blocks(bert, 1, [{"input_ids": torch.ones(2, 5, dtype=torch.long)}])
        >>> shallow.model.config.num_hidden_layers, len(shallow.model.encoder.layer)
        (2, 2)
    """
    run = _Run(copy_of(model), as_data(data), criterion)
    return run.run(_asked(drop), example_inputs, frozenset(keep))


def _asked(drop: Any) -> int | Target:
    """A number of blocks or a target; a text or number without a unit would be taken for sparsity."""
    if not isinstance(drop, bool) and isinstance(drop, Integral):
        return int(drop)
    if isinstance(drop, (Target, Mapping)) or (isinstance(drop, str) and "=" in drop):
        return Target.parse(drop)
    raise UsageError(
        f"drop_blocks(drop={drop!r})",
        kind_of(drop),
        "blocks go by their number, or until a target with a unit is met",
        "write e.g. drop=2 or drop='params=70%'",
    )


@dataclass
class _Run:
    model: nn.Module
    data: Data | None
    criterion: BlockInfluence | BlockLoss

    def run(self, drop: int | Target, example: Any, keep: frozenset[str]) -> Pruned:
        begun = time.perf_counter()
        example = self._example(example)
        blocks = blocks_of(self.model, example)
        scores = self._scores(blocks)
        free = [b for b in blocks if b.path not in keep]
        gone = self._gone(drop, free, blocks, scores, example)
        target = self._target(drop, gone, example)
        edits = removal_of(self.model, gone, example)
        surgery = surgery_for(
            self.model, Cuts(), [BlockEdit(e.module, e.kind, e.details) for e in edits]
        )
        with torch.no_grad(), evaluating(self.model), bypassed(self.model, gone):
            wanted = predictions(call(self.model, example))
        before = _parameters(self.model)
        for edit in edits:
            carry_out_(self.model, edit)
        with torch.no_grad(), evaluating(self.model):
            error = compare(predictions(call(self.model, example)), wanted).error
        if not error <= _NEAR:
            raise DataError(
                "removing blocks",
                f"the network without them differs from the bypassed one by {error:.2g}",
                "a block is used in a way that a run on the example did not show",
                f"name blocks to keep with keep=, e.g. {gone[0].path!r}",
            )
        facts = self._facts(drop, scores, gone)
        facts.measures |= target
        _note_missed(facts)
        facts.measures |= {"proof": error, "parameters": [before, _parameters(self.model)]}
        facts.measures["seconds"] = time.perf_counter() - begun
        return Pruned(self.model, Masks({}), facts, remember_(self.model, surgery))

    def _example(self, example: Any) -> Any:
        if example is not None:
            return example
        if self.data is None or self.data.train is None:
            raise UsageError(
                "removing blocks without example inputs",
                "neither example_inputs nor training batches were given",
                "blocks are found by running the network once",
                "pass data=, or example_inputs= and criterion data",
            )
        first = to_device(first_of(self.data.train), device_of(self.model))
        positional, named = inputs_of(first)
        return named or positional

    # -- scores ---------------------------------------------------------------------------------

    def _scores(self, blocks: Sequence[Block]) -> dict[str, float]:
        if not blocks:
            return {}
        if self.data is None or self.data.train is None:
            raise NeedsData(
                f"criterion {type(self.criterion).__name__}",
                lack(self.data),
                "it works on training batches",
                "pass data=",
            )
        if isinstance(self.criterion, BlockLoss):
            return self._rises(blocks, [])
        paths = tuple(block.path for block in blocks)
        criterion = replace(self.criterion, paths=paths)
        stats = collect(self.model, [], criterion.needs, self.data.sample())
        return dict(zip(paths, criterion(stats).tolist(), strict=False))

    def _rises(self, blocks: Sequence[Block], gone: Sequence[Block]) -> dict[str, float]:
        """The rise of the loss for each block that is left out beside those that are gone."""
        now = self._loss(gone)
        return {b.path: self._loss([*gone, b]) - now for b in blocks if b not in gone}

    @torch.no_grad()
    def _loss(self, gone: Sequence[Block]) -> float:
        assert self.data is not None
        batches, loss = self.data.sample(), self.data.loss or default_loss
        with evaluating(self.model), bypassed(self.model, gone):
            found = [loss(self.model, to_device(b, device_of(self.model))) for b in batches]
        return float(torch.stack([x.double().cpu() for x in found]).mean())

    # -- choice ---------------------------------------------------------------------------------

    def _gone(
        self,
        drop: int | Target,
        free: list[Block],
        blocks: Sequence[Block],
        scores: dict[str, float],
        example: Any,
    ) -> list[Block]:
        costs: Mapping[str, float] = dict.fromkeys((b.path for b in blocks), 1.0)
        spare = float(drop) if isinstance(drop, int) else 0.0
        if not isinstance(drop, int):
            target = drop
            costs, dense = self._costs(target, blocks, example)
            spare = dense - target.limit(dense)
            most = sum(costs[b.path] for b in free)
            if spare > most:
                raise BudgetError(
                    f"{target.unit}={target.value:g}",
                    f"without any of the {len(free)} blocks {dense - most:,.0f} of {dense:,.0f} stay",
                    "only blocks are removed here",
                    "ask for more, and make what is left narrower with shrink",
                )
        elif not 1 <= drop < len(blocks) or drop > len(free):
            raise UsageError(
                f"removing {drop} blocks of {kind_of(self.model)}",
                f"it has {len(blocks)} that can be left out, and {len(blocks) - len(free)} are kept",
                "at least one goes and one stays; a block adds to what passes through it, and only "
                "an identity shortcut can be left alone",
                "see blocks_of(model, example)",
            )
        span = getattr(self.criterion, "span", 1)
        if span > 1:
            return self._neighbours(drop, free, blocks, scores)
        gone: list[Block] = []
        while sum(costs[b.path] for b in gone) < spare:
            left = [b for b in free if b not in gone]
            if isinstance(self.criterion, BlockLoss) and self.criterion.greedy and gone:
                scores |= self._rises(left, gone)
            gone.append(min(left, key=lambda b: scores[b.path]))
        return [b for b in blocks if b in gone]

    def _neighbours(
        self, drop: Any, free: Sequence[Block], blocks: Sequence[Block], scores: Mapping[str, float]
    ) -> list[Block]:
        span = getattr(self.criterion, "span", 1)
        runs = [list(blocks[i : i + span]) for i in range(len(blocks) - span + 1)]
        runs = [run for run in runs if all(b in free for b in run)]
        if drop != span or not runs:
            raise UsageError(
                f"removing {drop} blocks by the influence of {span} neighbours",
                f"{len(runs)} runs of {span} neighbours can go",
                "the score of a run is that of removing all of it",
                f"ask for {span} blocks, or take span={drop}",
            )
        return min(runs, key=lambda run: scores[run[0].path])

    def _costs(
        self, target: Target, blocks: Sequence[Block], example: Any
    ) -> tuple[dict[str, float], float]:
        """The cost of each block, and of the whole network."""
        if target.unit not in ("params", "macs"):
            raise UsageError(
                f"removing blocks to {target.unit}={target.value:g}",
                "its units here are params and macs",
                "a block goes whole or not at all",
                "write params=70%, macs=70%, or the number of blocks",
            )
        named = dict(self.model.named_parameters())
        factors = dict.fromkeys(named, 1.0)
        if target.unit == "macs":
            mapping = isinstance(example, (Tensor, Mapping))
            batch = example if mapping else (*example, None)
            factors = uses(self.model, discover(self.model), batch)
        each = {n: factors.get(n, 0.0) * p.numel() for n, p in named.items()}
        inside = {
            b.path: sum(cost for n, cost in each.items() if n.startswith(f"{b.path}."))
            for b in blocks
        }
        return inside, sum(each.values())

    def _target(self, drop: int | Target, gone: list[Block], example: Any) -> dict[str, Any]:
        """What was asked for and what is reached, in the unit of the target; nothing for a number."""
        if isinstance(drop, int):
            return {}
        costs, dense = self._costs(drop, gone, example)
        reached = dense - sum(costs.values())
        told = {"unit": drop.unit, "dense": dense, "limit": drop.limit(dense), "reached": reached}
        return {"target": told}

    def _facts(self, drop: Any, scores: Mapping[str, float], gone: Sequence[Block]) -> Facts:
        name = type(self.criterion).__name__
        recipe = {"drop_blocks": drop if isinstance(drop, int) else str(drop), "criterion": name}
        facts = Facts(recipe, environment=environment())
        facts.measures["block_scores"] = dict(scores)
        for block in gone:
            told = f"{name} {scores[block.path]:.4g}" if block.path in scores else "with its run"
            facts.note("removed-block", block.path, f"{told}; {block.parameters:,} parameters")
        return facts


def _note_missed(facts: Facts) -> None:
    told = facts.measures.get("target")
    if told and told["limit"] - told["reached"] > TOLERANCE * told["limit"]:
        text = (
            f"asked for {told['limit']:,.4g} {told['unit']}, reached {told['reached']:,.4g}: blocks go "
            "whole, and without the last that went the target would not have been met"
        )
        facts.note("target", "", text)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
