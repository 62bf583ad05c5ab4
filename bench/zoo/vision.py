"""Vision models of Transformers, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

Example = Any


def _model(name: str, task: str, size: int = 32, **config: Any) -> Callable[[], Any]:
    """A Transformers model of random weights, and pixels for it."""

    def build() -> tuple[nn.Module, Example]:
        settings = getattr(transformers, f"{name}Config")(**config)
        model: nn.Module = getattr(transformers, f"{name}For{task}")(settings)
        return model, {"pixel_values": torch.randn(2, 3, size, size)}

    return build


def _classifier(name: str, size: int = 32, **config: Any) -> Callable[[], Any]:
    return _model(name, "ImageClassification", size, num_labels=5, **config)


STAGES = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [2, 1]}
WIDE = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1]}
FOUR = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
HEADS = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
}
ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
SHIFTED = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def _detr() -> tuple[nn.Module, Example]:
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_queries=6,
        num_labels=4,
    )
    model = transformers.DetrForObjectDetection(config)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def _two_towers(name: str, width: int, heads: int, **config: Any) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, Example]:
        vision = ENCODER | {"hidden_size": width, "num_attention_heads": heads}
        text = {key: ENCODER[key] for key in list(ENCODER)[:4]} | {
            "vocab_size": 50,
            "max_position_embeddings": 16,
            "projection_size": 24,
            "pad_token_id": 1,
            "bos_token_id": 48,
            "eos_token_id": 49,
        }
        settings = getattr(transformers, f"{name}Config")(
            text_config=text, vision_config=vision, **config
        )
        tokens = torch.randint(2, 48, (2, 7))
        tokens[:, -1] = 49
        pixels = torch.randn(2, 3, 32, 32)
        model: nn.Module = getattr(transformers, f"{name}Model")(settings)
        return model, {"input_ids": tokens, "pixel_values": pixels}

    return build


MODELS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "ResNet basic": _classifier("ResNet", layer_type="basic", **STAGES),
    "ResNet bottleneck": _classifier("ResNet", layer_type="bottleneck", **WIDE),
    "MobileNetV1": _classifier("MobileNetV1", depth_multiplier=0.25, min_depth=8),
    "MobileNetV2": _classifier("MobileNetV2", depth_multiplier=0.25, min_depth=8),
    "EfficientNet": _classifier(
        "EfficientNet",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
    ),
    "RegNet x": _classifier("RegNet", groups_width=8, layer_type="x", **WIDE),
    "RegNet y": _classifier("RegNet", groups_width=8, layer_type="y", **WIDE),
    "ConvNeXt": _classifier("ConvNext", 64, **FOUR),
    "ConvNeXtV2": _classifier("ConvNextV2", 64, **FOUR),
    "BiT": _classifier(
        "Bit", embedding_size=16, hidden_sizes=[32, 64], depths=[2, 1], num_groups=4
    ),
    "BiT bottleneck": _classifier(
        "Bit",
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 1],
        num_groups=4,
        layer_type="bottleneck",
    ),
    "ViT": _classifier("ViT", **ENCODER),
    "DeiT": _model("DeiT", "ImageClassificationWithTeacher", num_labels=5, **ENCODER),
    "BEiT": _classifier(
        "Beit", use_relative_position_bias=True, layer_scale_init_value=0.1, **ENCODER
    ),
    "Swin": _classifier("Swin", **SHIFTED),
    "SwinV2": _classifier("Swinv2", **SHIFTED),
    "PVT": _classifier(
        "Pvt",
        image_size=32,
        patch_sizes=[4, 2, 2, 2],
        strides=[4, 2, 2, 2],
        sequence_reduction_ratios=[4, 2, 2, 1],
        **HEADS,
    ),
    "SegFormer": _model(
        "Segformer", "SemanticSegmentation", 64, num_labels=5, decoder_hidden_size=16, **HEADS
    ),
    "DETR": _detr,
    "YOLOS": _model(
        "Yolos", "ObjectDetection", **(ENCODER | {"image_size": [32, 32]}), num_detection_tokens=4
    ),
    "DINOv2": _classifier("Dinov2", mlp_ratio=2, layerscale_value=0.1, **ENCODER),
    "CLIP": _two_towers("CLIP", 32, 4, projection_dim=16),
    "SigLIP": _two_towers("Siglip", 24, 3),
}
