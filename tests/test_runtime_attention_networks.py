"""Attention in one operator, in models as PyTorch's exporter writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_cases import onnx, run
from torch import Tensor, nn

import secateur
from secateur.runtime import library
from secateur.runtime.compiler.attention import OURS, THEIRS, attentions, is_block
from secateur.runtime.compiler.compile import read_graph
from secateur.runtime.compiler.rewrite import sparse_model
from secateur.runtime.compiler.verify import largest_error

# Each block becomes an operator of each of these domains.
DOMAINS = [THEIRS, *([OURS] if library.available() else [])]


class Outer(nn.Module):
    """The first output of a network of Transformers."""

    def __init__(self, inner: nn.Module, *, masked: bool) -> None:
        super().__init__()
        self.inner, self.masked = inner.eval(), masked

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        more = {"attention_mask": mask} if self.masked else {}
        return self.inner(x, **more)[0]  # type: ignore[no-any-return]


def bert(attention: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(**sizes, num_hidden_layers=2, vocab_size=90, attn_implementation=attention)
    return BertModel(config, add_pooling_layer=False)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4)
    return ViTModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=90, use_cache=False))


@pytest.mark.parametrize(
    ("make", "masked", "bias"),
    [
        (lambda: bert("eager"), True, True),
        (lambda: bert("sdpa"), True, True),
        (lambda: bert("eager"), False, False),
        (vit, False, False),
        (gpt2, False, True),
    ],
    ids=["bert eager", "bert", "bert eager, no mask", "vit", "gpt2"],
)
def test_attention_of_networks(tmp_path: Path, make: Any, masked: bool, bias: bool) -> None:
    torch.manual_seed(0)
    net = Outer(make(), masked=masked)
    x = torch.randn(2, 3, 16, 16) if make is vit else torch.randint(3, 90, (2, 9))
    given = {"x": x}
    if masked:
        given["mask"] = torch.ones(2, 9, dtype=torch.long)
        given["mask"][1, 5:] = 0
    secateur.export_onnx(net, given, tmp_path / "net.onnx")
    graph = read_graph(tmp_path / "net.onnx")
    found = attentions(graph)
    assert len(found) == 2
    assert [bool(one.mask) for one in found] == [bias, bias]
    numbers = {name: value.numpy() for name, value in given.items()}
    blind = {**numbers, "mask": np.zeros((2, 9), np.int64)}
    expected = run(graph.model, numbers)
    for domain in DOMAINS:
        own = sparse_model(graph, (), [replace(one, domain=domain) for one in found])
        onnx.checker.check_model(own)
        blocks = {node.output[0] for node in own.graph.node if is_block(node)}
        assert len(blocks) == 2
        assert not blocks & {value.name for value in own.graph.value_info}
        assert largest_error(expected, run(own, numbers)) < 1e-5
        if masked:  # the mask matters, and a sample that sees nothing is as before
            nothing = run(graph.model, blind)
            assert largest_error(expected, nothing) > 1e-3
            assert largest_error(nothing, run(own, blind)) < 1e-5


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4)
    return CLIPVisionModel(config)


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize(
    ("make", "masked", "batch"),
    [
        (lambda: bert("sdpa"), False, 1),
        (lambda: bert("sdpa"), True, 2),
        (vit, False, 2),
        (clip, False, 2),
    ],
    ids=["bert", "bert with mask", "vit", "clip"],
)
def test_attention_of_networks_for_one_size(
    tmp_path: Path, make: Any, masked: bool, batch: int
) -> None:
    torch.manual_seed(0)
    net = Outer(make(), masked=masked).eval()
    words = [torch.randint(3, 90, (batch, 9)), (torch.arange(9) < 5).long().repeat(batch, 1)]
    given = [torch.randn(batch, 3, 16, 16)] if make in (vit, clip) else words[: 1 + masked]
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, tuple(given), path, dynamo=True, external_data=False, verbose=False)
    graph = read_graph(path)
    found = attentions(graph)
    assert [bool(one.mask) for one in found] == [masked, masked]
    names = [value.name for value in graph.model.graph.input]
    numbers = {name: value.numpy() for name, value in zip(names, given, strict=True)}
    for domain in DOMAINS:
        own = sparse_model(graph, (), [replace(one, domain=domain) for one in found])
        onnx.checker.check_model(own)
        assert largest_error(run(graph.model, numbers), run(own, numbers)) < 1e-5
