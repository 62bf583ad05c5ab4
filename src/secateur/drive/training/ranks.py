"""Several processes: masks are decided once, statistics are merged, fingerprints compared.

Everything here does nothing unless ``torch.distributed`` is initialised with two processes or more.
Texts travel as bytes in tensors: torch's own exchange of objects is made of pickles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError
from secateur.core.masks import Masks, pack_bits, unpack_bits
from secateur.core.slots import Slot
from secateur.stats import Stats


def world() -> int:
    """How many processes train together.

    Example:
        >>> world()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank() if world() > 1 else 0


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def finite_everywhere(value: float) -> bool:
    """Whether a number of each process is neither infinite nor NaN.

    Example:
        >>> finite_everywhere(1.5), finite_everywhere(math.nan)
        (True, False)
    """
    if world() == 1:
        return math.isfinite(value)
    broken = torch.tensor([0.0 if math.isfinite(value) else 1.0], device=_wire())
    dist.all_reduce(broken)
    return not broken.item()


def gather_text(text: str) -> list[str]:
    """The texts of all processes, in order.

    Example:
        >>> gather_text("a")
        ['a']
    """
    if world() == 1:
        return [text]
    data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8).to(_wire())
    sizes = [torch.zeros(1, dtype=torch.int64, device=_wire()) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=_wire()))
    longest = max(int(size) for size in sizes)
    padded = nn.functional.pad(data, (0, longest - len(data)))
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return [
        bytes(t[: int(n) - 1].cpu().numpy()).decode() for t, n in zip(found, sizes, strict=True)
    ]


def require_agreement(what: str, text: str) -> None:
    """Compare a fingerprint over all processes.

    Args:
        what: What is compared, for the message.
        text: The fingerprint of this process.

    Raises:
        DataError: They differ; the processes are named. All of them raise it.

    Example:
        >>> require_agreement("the masks before step 1", "3fa0")
    """
    found = gather_text(text)
    if len(set(found)) == 1:
        return
    usual = max(found, key=found.count)  # ties: the one of the lowest process
    others = [f"rank {i} has {t!r}" for i, t in enumerate(found) if t != usual]
    raise DataError(
        f"{what} on {len(found)} processes",
        f"{', '.join(others[:8])}; the others have {usual!r}",
        "every process must hold the same masks and be at the same step of the same recipe",
        "start all processes from one checkpoint and with one recipe, and call step() in each of them",
    )


def decided(masks: Masks) -> Masks:
    """The masks of process 0, in every process.

    Example:
        >>> decided(Masks({"w": torch.tensor([True, False])}))["w"].tolist()
        [True, False]
    """
    if world() == 1:
        return masks
    names = sorted(masks)
    packed = torch.cat([pack_bits(masks[name]).to(_wire()) for name in names])
    dist.broadcast(packed, src=0)
    taken, start = {}, 0
    for name in names:
        mask = masks[name]
        size = -(-mask.numel() // 8)
        taken[name] = unpack_bits(packed[start : start + size], tuple(mask.shape)).to(mask.device)
        start += size
    return Masks({name: taken[name] for name in masks})


def settled(masks: Masks, before: Masks, place: str) -> Masks:
    """The masks of process 0 in every process, if all held the same ones before.

    Args:
        masks: What this process decided.
        before: What it holds.
        place: Recipe and step of this process.

    Raises:
        DataError: Recipe, step or masks differ; the processes are named.

    Example:
        >>> masks = Masks({"w": torch.tensor([True, False])})
        >>> settled(masks, masks, "ab 1") is masks
        True
    """
    if world() == 1:
        return masks
    what = "recipe, step and masks before an update"
    require_agreement(what, f"{place} {before.fingerprint()}")
    return decided(masks)


def merged(stats: Stats, needs: Iterable[Any], slots: list[Slot], model: nn.Module) -> Stats:
    """Statistics that every process measured on its own data, as those of all data.

    Statistics are sums, so the sums are added up. Results of probes (Hessian products and the like)
    are not sums: those of process 0's data decide, because it is process 0 that decides the masks.

    Args:
        stats: What this process measured.
        needs: The statistics that were asked for.
        slots: The weights.
        model: Where the weights are.
    """
    if world() == 1:
        return stats
    saved: dict[str, Any] = stats.state_dict()["states"]
    keys = [(need, slot) for need in needs if hasattr(need, "init") for slot in slots]
    # A weight that no data of this process reached still takes part in the sum, as zeros.
    reached = {text for found in gather_text(json.dumps(list(saved))) for text in json.loads(found)}
    sums: dict[str, Any] = {}
    for need, slot in keys:
        text = f"{need!r} {slot.name}"
        if text not in reached:
            continue
        state = saved.get(text)
        state = need.init(slot.weight(model)) if state is None else state
        sums[text] = {part: _summed(state[part]) for part in sorted(state)}
    joined = Stats(stats.seed)
    joined.load_state_dict({"states": sums, "memory": {}}, [(n, s.name) for n, s in keys])
    return joined.keep_values(stats)


def require_averaged(model: nn.Module) -> None:
    """Refuse to train a network by several processes if nothing averages its gradients.

    Args:
        model: As it is trained.

    Raises:
        UsageError: There is no wrapper that does, on it or inside.

    Example:
        >>> require_averaged(nn.Linear(2, 1))
    """
    if world() == 1:
        return
    wrapped = any(type(module).__name__ in _AVERAGING for module in model.modules())
    if not wrapped and not any(_shared_out(p) for p in model.parameters()):
        raise UsageError(
            f"training {type(model).__name__} in one of {world()} processes",
            "it is a plain network, and not in DistributedDataParallel",
            "nothing would average its gradients, and each process would end with weights of its own",
            "wrap it for finetune(), or for Gradual in a loop of your own; what trains a copy (prune and "
            "shrink with FineTune, learn_masks) is for a single process",
        )


def require_equal_epochs(batches: int) -> None:
    """Refuse shards of the data that give the processes epochs of unequal length.

    Args:
        batches: Of an epoch of this process.

    Raises:
        DataError: They differ. All processes raise it.

    Example:
        >>> require_equal_epochs(10)
    """
    found = gather_text(str(batches))
    if len(set(found)) > 1:
        raise DataError(
            f"training in {len(found)} processes",
            f"their epochs have {', '.join(found[:8])} batches",
            "every step waits for all processes, and in the longer ones it would wait for ever",
            "give each as many, e.g. with DistributedSampler or secateur.Shuffled(share=...)",
        )


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the wrapper of Accelerate.

    Example:
        >>> sgd = torch.optim.SGD(nn.Linear(2, 1).parameters(), 0.1)
        >>> bare_optimizer(sgd) is sgd
        True
    """
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def require_whole(model: nn.Module) -> None:
    """Refuse parameters that are shared out among processes (FSDP, tensor parallelism).

    Raises:
        UsageError: A parameter is a ``DTensor``, or a part is wrapped in ``FullyShardedDataParallel``.

    Example:
        >>> require_whole(nn.Linear(2, 1))
    """
    shared = (name for name, p in model.named_parameters() if _shared_out(p))
    found = [f"{name!r} is a DTensor (fully_shard or tensor parallelism)" for name in shared]
    wrapped = (type(module).__name__ for module in model.modules())
    found += [f"it has a {kind}" for kind in wrapped if kind == "FullyShardedDataParallel"]
    if found:
        raise UsageError(
            "pruning a model whose parameters are shared out among processes",
            found[0],
            "scores are ranked and masks are held on whole weights, and no process holds one",
            "train with DistributedDataParallel; to prune without training, do it before the "
            "parameters are shared out",
        )


def _shared_out(parameter: Tensor) -> bool:
    return type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh")


def _summed(part: Tensor) -> Tensor:
    whole = part.detach().to(_wire(), copy=True).contiguous()
    dist.all_reduce(whole)
    return whole.to(part.device)


def _wire() -> torch.device:
    """Where tensors must lie to be sent."""
    nccl = "nccl" in str(dist.get_backend())
    gloo = "gloo" in str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if nccl and not gloo else _CPU


_CPU = torch.device("cpu")
# Wrappers whose backward pass averages gradients over all processes.
_AVERAGING = ("DistributedDataParallel", "FullyShardedDataParallel")
