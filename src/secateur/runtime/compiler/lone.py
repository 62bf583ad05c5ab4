"""One layer as a model of its own, dense or sparse, to be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.rewrite import replacement
from secateur.runtime.compiler.site import Site
from secateur.runtime.native import Variant
from secateur.runtime.operators import opset as sparse_opset


@dataclass(frozen=True)
class Lone:
    """Some copies of a layer side by side, each with inputs of its own and all with its weights.

    Args:
        graph: Where the layer comes from.
        site: The layer.
        inputs: Shapes of what it reads.
        copies: How many times it stands in the model.
    """

    graph: Graph
    site: Site
    inputs: Mapping[str, tuple[int, ...]]
    copies: int = 1

    def dense(self) -> Any:
        """The very nodes that stand in the graph."""
        import onnx

        nodes = [self.graph.nodes[i] for i in self.site.nodes]
        made = {name for node in nodes for name in node.output}
        weights = {}
        for name in (name for node in nodes for name in node.input):
            held = self.graph.constant(name)
            if held is not None and name not in made:
                weights[name] = onnx.numpy_helper.from_array(np.asarray(held, order="C"), name)
        return self._model(nodes, list(weights.values()), self.graph.model.opset_import)

    def sparse(self, variant: Variant, positions: int) -> Any:
        """The operator that would replace them."""
        nodes, weights = replacement(self.site, variant, positions, self.graph.opset)
        return self._model(nodes, weights, [*self.graph.model.opset_import, sparse_opset()])

    def feeds(self) -> dict[str, np.ndarray]:
        """Random inputs of every copy."""
        rng = np.random.default_rng(0)
        return {
            _copied(name, copy): rng.standard_normal(shape).astype(np.float32)
            for copy in range(self.copies)
            for name, shape in self.inputs.items()
        }

    def _model(self, nodes: Sequence[Any], weights: Sequence[Any], opsets: Sequence[Any]) -> Any:
        import onnx
        from onnx import helper

        own = {*self.inputs, *(name for node in nodes for name in node.output)} - {""}
        many, inputs, outputs = [], [], []
        floats = onnx.TensorProto.FLOAT
        for copy in range(self.copies):
            for i, node in enumerate(nodes):
                new = onnx.NodeProto()
                new.CopyFrom(node)
                new.name = f"{copy}.{i}"
                for names in (new.input, new.output):
                    names[:] = [_copied(name, copy) if name in own else name for name in names]
                many.append(new)
            for name, shape in self.inputs.items():
                inputs.append(helper.make_tensor_value_info(_copied(name, copy), floats, shape))
            shape = self.site.output_shape(self.inputs[self.site.x])
            outputs.append(helper.make_tensor_value_info(_copied(self.site.y, copy), floats, shape))
        graph = helper.make_graph(many, "layer", inputs, outputs, list(weights))
        version = self.graph.model.ir_version
        return helper.make_model(graph, opset_imports=list(opsets), ir_version=version)


def _copied(name: str, copy: int) -> str:
    """A name that no weight has: exporters call them ``conv.0``, ``conv.1``."""
    return f"{name} (copy {copy})"
