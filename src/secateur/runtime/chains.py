"""The operator ``SparseChain``: sparse convolutions that run one after the other, band by band.

Around a depthwise convolution a network is widest: one layer widens before it, one narrows after it. To
write out what lies between and read it back may take longer than to compute it. A
chain computes some rows of its output at a time, so that what is between stays in the second cache.

A node has the inputs X, residual (may be left out; added by the last layer), and values, index and
bias of every layer. Its attributes are those of each layer's ``SparseConv``, with ``_0``, ``_1`` and
so on behind their names, the names of the layers and of what they hand on, and ``layers``, their
number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.core.errors import FormatError
from secateur.runtime.library import ABI
from secateur.runtime.native import Spec, Variant
from secateur.runtime.operators import CHAIN, DOMAIN, NAMES, onnx_helper, spec_of, variant_of

#: Layers that one chain can have.
MOST = 3
# Inputs of a SparseConv: X, then its weight, then what is added before the activation.
_WEIGHT, _RESIDUAL = slice(1, 4), 4
# Attributes that only a chain has: what the layers were called, and what they hand on.
_NAME, _Y = "name", "y"


def takes_bands(spec: Spec, variant: Variant) -> bool:
    """Whether a layer can stand in a chain: with the depthwise kernel, or of single pixels.

    Example:
        >>> takes_bands(Spec("conv", 8, 8), Variant("list", 1, 4))
        True
        >>> takes_bands(Spec("conv", 8, 8, stride=(2, 2)), Variant("list", 1, 4))
        False
    """
    pixels = (*spec.kernel, *spec.stride) == (1, 1, 1, 1) and not any(spec.pads)
    return spec.kind == "conv" and (variant.family == "depthwise" or pixels)


def chain_node(nodes: Sequence[Any]) -> Any:
    """One node that computes what some nodes compute one after the other.

    Args:
        nodes: Two or three ``SparseConv``, each of which reads what the one before makes, and of
            which only the last has a residual.

    Example:
        >>> import numpy as np
        >>> from secateur.runtime.native import Spec, Variant
        >>> from secateur.runtime.operators import sparse_node
        >>> point = Spec("conv", 2, 2), np.ones((2, 2, 1, 1), np.float32), Variant("list", 1, 1)
        >>> deep = Spec("conv", 2, 1, groups=2, kernel=(3, 3), pads=(1, 1, 1, 1))
        >>> deep = deep, np.ones((2, 1, 3, 3), np.float32), Variant("depthwise", 1, 1)
        >>> a, b = (
        ...     sparse_node(weight, spec, variant, name=name, x=x, y=y, isa_lanes=8)[0]
        ...     for (spec, weight, variant), name, x, y in ((point, "a", "x", "m"), (deep, "b", "m", "y"))
        ... )
        >>> chain = chain_node([a, b])
        >>> list(chain.input)
        ['x', '', 'a.values', 'a.index', '', 'b.values', 'b.index']
        >>> links(chain) == [a, b]
        True
    """
    helper = onnx_helper()
    inputs = [nodes[0].input[0], _residual(nodes[-1])]
    attributes: dict[str, Any] = {"abi": ABI, "layers": len(nodes)}
    for i, node in enumerate(nodes):
        inputs += [*node.input[_WEIGHT], ""][:3]
        held = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "abi"}
        held |= {_NAME: node.name, _Y: node.output[0]}
        attributes |= {f"{key}_{i}": value for key, value in held.items()}
    while not inputs[-1]:
        inputs.pop()
    made = helper.make_node(CHAIN, inputs, nodes[-1].output, name=nodes[-1].name, domain=DOMAIN)
    made.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return made


def links(node: Any) -> list[Any]:
    """The nodes that a chain stands for.

    Raises:
        FormatError: An attribute is missing or has no meaning.

    Example:
        See :func:`chain_node`.
    """
    helper = onnx_helper()
    held = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    count = held.get("layers")
    if not isinstance(count, int) or not 2 <= count <= MOST:
        raise _damaged(node, f"it has {count!r} layers")
    x, residual, *weights = [*node.input, *[""] * (2 + 3 * count)][: 2 + 3 * count]
    nodes = []
    for i in range(count):
        own = {k.removesuffix(f"_{i}"): v for k, v in held.items() if k.endswith(f"_{i}")}
        last = i + 1 == count
        y = node.output[0] if last else _text(node, own, _Y)
        inputs = [x, *weights[3 * i : 3 * i + 3], residual if last else ""]
        while not inputs[-1]:
            inputs.pop()
        name = _text(node, own, _NAME)
        link = helper.make_node(NAMES["conv"], inputs, [y], name=name, domain=DOMAIN)
        about = {"abi": held.get("abi"), **own}
        link.attribute.extend(
            helper.make_attribute(key, value)
            for key, value in about.items()
            if key not in (_NAME, _Y) and value is not None
        )
        nodes.append(link)
        x = y
    return nodes


def unchained(nodes: Sequence[Any]) -> list[Any]:
    """Nodes, with the layers of a chain in its place."""
    return [link for node in nodes for link in (links(node) if is_chain(node) else [node])]


def is_chain(node: Any) -> bool:
    """Whether an ONNX node is a chain of ours."""
    return bool(node.domain == DOMAIN and node.op_type == CHAIN)


def found_chains(nodes: Sequence[Any], used: Counter[str]) -> list[tuple[int, ...]]:
    """Which nodes can become chains: a depthwise layer, with what stands before and after it.

    Args:
        nodes: Of a graph, in an order in which they can run.
        used: How often each value is used, as an output of the graph, too.

    Returns:
        The numbers of the nodes of each chain.
    """
    makers = {name: i for i, node in enumerate(nodes) for name in node.output}
    readers = {node.input[0]: i for i, node in enumerate(nodes) if len(node.input)}
    convolutions = [
        i for i, n in enumerate(nodes) if (n.domain, n.op_type) == (DOMAIN, NAMES["conv"])
    ]
    free = {i for i in convolutions if takes_bands(spec_of(nodes[i]), variant_of(nodes[i]))}
    found = []
    for i in convolutions:
        node = nodes[i]
        if i not in free or variant_of(node).family != "depthwise":
            continue
        chain = [i]
        before, after = makers.get(node.input[0], i), readers.get(node.output[0], i)
        if before in free and _hands_on(nodes[before], node, used):
            chain.insert(0, before)
        if after in free and _hands_on(node, nodes[after], used):
            chain.append(after)
        if len(chain) > 1:
            found.append(tuple(chain))
            free -= set(chain)
    return found


def _residual(node: Any) -> str:
    """What a layer adds before its activation; empty if nothing."""
    return node.input[_RESIDUAL] if len(node.input) > _RESIDUAL else ""


def _hands_on(node: Any, other: Any, used: Mapping[str, int]) -> bool:
    """Whether another node, and nothing else, reads what a node makes, which is a product alone."""
    y = node.output[0]
    return bool(other.input[0] == y) and used[y] == 1 and not _residual(node)


def _text(node: Any, held: Mapping[str, Any], key: str) -> str:
    if not isinstance(held.get(key), bytes):
        raise _damaged(node, f"a layer has no attribute {key!r}")
    return str(held[key].decode(errors="replace"))


def _damaged(node: Any, found: str) -> FormatError:
    why = "its attributes describe layers of another version, or were altered"
    return FormatError(f"the {CHAIN} {node.name!r}", found, why, "compile the model again")
