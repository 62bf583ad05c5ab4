"""Further language models of Transformers, small and with random weights.

Each states its sizes in another way: heads and places of a head in one matrix, rotated in part or in
pairs, keys that all heads share, sizes that are sums, products or quotients of others.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from bench.zoo.fresh import refresh_
from bench.zoo.text import ENDS, LLAMA, WIDE, WORDS, words

# The number of heads is that of the places that are rotated: a size must not be taken for another.
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, **ENDS}
FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_size": WORDS,
    "alibi": False,
    **ENDS,
}
EXPERTS = {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

#: name -> (class, arguments of its configuration)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-j": ("GPTJForCausalLM", {**GPT, "n_inner": 48, "rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", {**GPT, "n_inner": 48}),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": WORDS}),
    "falcon": ("FalconForCausalLM", {**FALCON, "multi_query": False, "bias": True}),
    "falcon-7b": ("FalconForCausalLM", {**FALCON, "multi_query": True}),
    "falcon-40b": (
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "phi": ("PhiForCausalLM", LLAMA),
    "stablelm": ("StableLmForCausalLM", LLAMA),
    "cohere": ("CohereForCausalLM", LLAMA),
    "glm4": ("Glm4ForCausalLM", WIDE),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", LLAMA),
    "gemma3": ("Gemma3ForCausalLM", {**WIDE, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "smollm3": ("SmolLM3ForCausalLM", {**LLAMA, "no_rope_layers": [1, 0]}),
    "persimmon": (
        "PersimmonForCausalLM",
        {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    ),
    "diffllama": ("DiffLlamaForCausalLM", LLAMA),
    "qwen3-moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "gpt-oss": ("GptOssForCausalLM", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "jetmoe": (
        "JetMoeForCausalLM",
        {
            **{key: value for key, value in LLAMA.items() if key != "num_attention_heads"},
            "kv_channels": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek-v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek-v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 6,
            "n_groups": 1,
            "conv_kernel": 3,
            "chunk_size": 4,
            "vocab_size": WORDS,
            **ENDS,
        },
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        {
            **{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
            "local_attention": 4,
            "cls_token_id": 3,
            "sep_token_id": 4,
        },
    ),
    "longformer": (
        "LongformerForSequenceClassification",
        {
            **{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
            "attention_window": [4, 4],
            "max_position_embeddings": 66,
        },
    ),
}


def example() -> dict[str, Tensor]:
    """Inputs of all of them."""
    return {"input_ids": words()}


def build(name: str) -> Any:
    """A network whose every parameter matters."""
    kind = getattr(transformers, ZOO[name][0])
    torch.manual_seed(0)
    model = kind(kind.config_class(**ZOO[name][1])).eval()
    refresh_(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.std() < 0.1:
                p.copy_(0.2 * torch.randn_like(p))
    return model
