"""Find the weights of a torch module: every parameter gets a role or a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.errors import kind_of
from secateur.core.plain import is_wrapper
from secateur.core.slots import InputRows, Slot
from secateur.core.weight import CONV1D, CONV2D, CONV3D, LINEAR, Axes
from secateur.frontends import rows

Kind = tuple[Axes, InputRows | None]

# An attribute name of the module -> axes and rows, per layer class. Subclasses inherit the entry.
_CONVOLUTIONS: dict[type[nn.Module], Axes] = {
    nn.Conv1d: CONV1D,
    nn.Conv2d: CONV2D,
    nn.Conv3d: CONV3D,
}
_TRANSPOSED: dict[type[nn.Module], Axes] = {
    nn.ConvTranspose1d: Axes(("in", "out", "kw")),
    nn.ConvTranspose2d: Axes(("in", "out", "kh", "kw")),
    nn.ConvTranspose3d: Axes(("in", "out", "kd", "kh", "kw")),
}
# Weights of nn.MultiheadAttention -> which of query, key and value they multiply.
_PROJECTIONS: dict[str, tuple[int, ...]] = {
    "in_proj_weight": (0, 1, 2),
    "q_proj_weight": (0,),
    "k_proj_weight": (1,),
    "v_proj_weight": (2,),
}
# Stacked experts, as Transformers names them: what reads the tokens, and what reads the hidden units.
_EXPERTS_READ, _EXPERTS_WRITE = ("gate_up_proj", "gate_proj", "up_proj"), "down_proj"
_SIZES = ("num_experts", "output_size", "input_size")
_NORMS = ("Norm",)
_ROUTERS, _ROUTER = ("router", "gate"), "a router of experts or a gate"
_IMAGE_CHANNELS = 4
_ADAPTER = "an adapter; once merged, it fills zeros of its base layer until masks are applied again"
_ASIDE = "a copy of it is trained and used in its place"


def discover(model: nn.Module) -> list[Slot]:
    """List every parameter of ``model`` once, in registration order.

    A parameter is *prunable* when it multiplies inputs in a way that is known here; otherwise its
    slot says why not. Parts that the field leaves dense by default are marked ``sensitive``: the
    convolution that reads the image, the final classifier, embeddings, routers of experts.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> for slot in discover(net):
        ...     print(slot.name, slot.prunable, slot.reason)
        0.weight True
        0.bias False a bias
        2.weight True
        2.bias False a bias
        3.weight False the last linear layer (classifier)
        3.bias False a bias
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    slots = [
        _slot(model, name, parameter, tuple(n for n in names[id(parameter)] if n != name))
        for name, parameter in model.named_parameters()
    ]
    return _mark_ends(model, slots)


def _slot(model: nn.Module, name: str, parameter: nn.Parameter, aliases: tuple[str, ...]) -> Slot:
    path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(path)
    shape = tuple(parameter.shape)
    kind = type(module).__name__
    owners = [type(model.get_submodule(a.rpartition(".")[0])) for a in aliases]
    if parameter.ndim < 2:
        return Slot(name, kind, shape, aliases=aliases, reason=_vector_reason(kind, attribute))
    if 0 in shape:
        return Slot(name, kind, shape, aliases=aliases, reason="it is empty")
    if not parameter.dtype.is_floating_point:
        reason = f"its type is {parameter.dtype}"
        return Slot(name, kind, shape, aliases=aliases, reason=reason)
    if is_wrapper(parameter):
        reason = f"it is {kind_of(parameter)}, quantized or coded otherwise; prune before that"
        return Slot(name, kind, shape, aliases=aliases, reason=reason)
    if isinstance(module, nn.Embedding) or any(issubclass(o, nn.Embedding) for o in owners):
        tied = " tied to " + ", ".join(aliases) if aliases else ""
        return Slot(
            name,
            kind,
            shape,
            LINEAR if isinstance(module, nn.Linear) else Axes(("in", "out")),
            None,
            aliases,
            f"an embedding{tied}",
            True,
        )
    inside = path.split(".")
    routes = inside[-1] in _ROUTERS or "router" in inside[-2:-1]
    found = _kind(module, attribute)
    if found is None:
        reason = _ROUTER if routes else _unknown_reason(module, kind, attribute)
        return Slot(name, kind, shape, aliases=aliases, reason=reason)
    axes, see = found
    others = (a.rpartition(".") for a in aliases)
    if any(_kind(model.get_submodule(path), attr) != found for path, _, attr in others):
        see = None  # layers of several kinds share it: no one way leads to what it multiplies
    reason = _ROUTER if routes else _adapter_reason(model, path)
    transposed = see is rows.transposed_convolution
    return Slot(name, kind, shape, axes, see, aliases, reason, bool(reason), transposed)


def _kind(module: nn.Module, attribute: str) -> Kind | None:
    """Axes and rows of a weight, by what its module is."""
    if attribute == "weight":
        if isinstance(module, nn.Linear):
            return LINEAR, rows.linear
        for known, axes in _CONVOLUTIONS.items():
            if isinstance(module, known):
                return _grouped(axes, module), rows.convolution
        for known, axes in _TRANSPOSED.items():
            if isinstance(module, known):
                return _grouped(axes, module), rows.transposed_convolution
        # Transformers' Conv1D is a linear layer with a transposed weight. Known by shape and name,
        # so that the package is not imported for models that do not use it.
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            return Axes(("in", "out")), rows.linear
    if isinstance(module, nn.MultiheadAttention) and attribute in _PROJECTIONS:
        return LINEAR, rows.Projected(*_PROJECTIONS[attribute])
    stacked = _stacked(module, attribute)
    if stacked is not None:
        return stacked, rows.Routed(attribute)
    if isinstance(module, nn.RNNCellBase) and attribute in ("weight_ih", "weight_hh"):
        return LINEAR, None  # prunable; which of its many calls to look at is the caller's business
    if isinstance(module, nn.RNNBase) and attribute.startswith("weight_") and not module.proj_size:
        hidden, _, rest = attribute.removeprefix("weight_").partition("_l")
        if hidden in ("ih", "hh"):
            layer, _, way = rest.partition("_")
            return LINEAR, rows.Recurrent(int(layer), way == "reverse", hidden == "hh")
    return None


def _stacked(module: Any, attribute: str) -> Axes | None:
    """Axes of the weight of several experts: ``(experts, out, in)``, or the other way round.

    A module says so itself (``is_transposed``, in Transformers, or the sizes of a single weight), or
    the shapes of gate and up in one weight and of down leave one way only.
    """
    sizes = tuple(getattr(module, name, None) for name in _SIZES)
    if attribute == "weight" and tuple(module.weight.shape) == sizes:
        return Axes(("expert", "out", "in"), groups=len(module.weight))
    first = next((n for n in _EXPERTS_READ if hasattr(module, n)), "")
    pair = [getattr(module, name, None) for name in (first, _EXPERTS_WRITE)] if first else []
    if attribute not in (*_EXPERTS_READ, _EXPERTS_WRITE) or not all(
        isinstance(p, nn.Parameter) and p.ndim == 3 for p in pair
    ):
        return None
    reads, writes = (tuple(p.shape) for p in pair if p is not None)
    turned = getattr(module, "is_transposed", None)
    if not isinstance(turned, bool):
        if reads[1:] == (2 * writes[2], writes[1]):
            turned = False
        elif reads[1:] == (writes[2], 2 * writes[1]):
            turned = True
        else:
            return None
    names = ("expert", "in", "out") if turned else ("expert", "out", "in")
    return Axes(names, groups=reads[0]) if reads[0] == writes[0] else None


def _adapter_reason(model: nn.Module, path: str) -> str:
    """Why a part that PEFT adds stays dense.

    It keeps an adapter beside a ``base_layer`` that it can be merged into, and beside a copy that is
    trained the ``original_module``.
    """
    steps = path.split(".")
    for i, step in enumerate(steps):
        owner = model.get_submodule(".".join(steps[:i]))
        beside = isinstance(getattr(owner, "base_layer", None), nn.Module)
        if beside and step != "base_layer" and callable(getattr(owner, "merge", None)):
            return _ADAPTER
        if step == "original_module" and hasattr(owner, "modules_to_save"):
            return _ASIDE
    return ""


def _grouped(axes: Axes, module: nn.Module) -> Axes:
    return Axes(axes.names, int(module.groups))  # type: ignore[arg-type]


def _vector_reason(kind: str, attribute: str) -> str:
    if any(part in kind for part in _NORMS):
        return "a normalisation"
    if "bias" in attribute:
        return "a bias"
    return "a vector"


def _unknown_reason(module: nn.Module, kind: str, attribute: str) -> str:
    if "bias" in attribute:
        return "a bias"
    if isinstance(module, nn.RNNBase):
        return "a recurrent projection: its inputs cannot be seen from outside"
    if isinstance(module, parametrize.ParametrizationList):
        return "a part of a parametrized weight; remove_parametrizations makes that a plain one"
    if isinstance(vars(module).get(attribute.rpartition("_")[0]), Tensor):
        return (
            "a weight is computed from it at every call; torch.nn.utils' prune.remove, remove_weight_norm "
            "or remove_spectral_norm makes that a plain one"
        )
    return f"no rule for parameters of {kind}"


def _mark_ends(model: nn.Module, slots: list[Slot]) -> list[Slot]:
    """Mark the convolution that reads the image, and the final classifier."""
    added = (_ADAPTER, _ASIDE)
    seen = (s for s in slots if s.axes and (s.rows is not None or not s.reason))
    weights = [s for s in seen if s.reason not in added]
    replaced: dict[str, Slot] = {}
    first = next((s for s in weights if s.axes is not None and s.axes.convolves), None)
    if first is not None and _reads_image(first):
        replaced[first.name] = _leave_out(first, "the convolution that reads the image")
    last = weights[-1] if weights else None
    if last is not None and len(weights) > 1 and _is_classifier(model, last):
        replaced[last.name] = _leave_out(last, "the last linear layer (classifier)")
    return [replaced.get(s.name, s) for s in slots]


def _reads_image(slot: Slot) -> bool:
    assert slot.axes is not None
    return slot.axes.groups == 1 and slot.shape[slot.axes.names.index("in")] <= _IMAGE_CHANNELS


def _is_classifier(model: nn.Module, slot: Slot) -> bool:
    """The last weight, if it is linear and not one of a numbered stack of blocks."""
    if slot.axes is None or len(slot.axes.names) != 2 or slot.kind in ("LSTM", "GRU", "RNN"):
        return False
    path = slot.module.split(".")
    parents = [".".join(path[:i]) for i in range(len(path))]
    return not any(isinstance(model.get_submodule(p), nn.ModuleList) for p in parents)


def _leave_out(slot: Slot, reason: str) -> Slot:
    return slot if slot.reason else replace(slot, reason=reason, sensitive=True)
