"""Language, audio and state-space models of Transformers, small and with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

WORDS = 60
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": WORDS,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**BERT, **ENDS, "num_key_value_heads": 2}
WIDE = {**LLAMA, "head_dim": 8}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    **ENDS,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": WORDS,
    "decoder_start_token_id": 0,
}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
}
DEBERTA = {**BERT, "relative_attention": True, "position_buckets": 8}
WAVE = {
    **BERT,
    "conv_dim": (16, 24, 16),
    "conv_stride": (3, 2, 2),
    "conv_kernel": (5, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 8,
}

#: name -> (class, arguments of its configuration)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "bert-class": ("BertForSequenceClassification", BERT),
    "bert-tied": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForSequenceClassification", BERT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": WORDS},
    ),
    "albert": ("AlbertForMaskedLM", {**BERT, "embedding_size": 12}),
    "electra": ("ElectraForPreTraining", {**BERT, "embedding_size": 12}),
    "deberta-shared": (
        "DebertaV2ForSequenceClassification",
        {
            **DEBERTA,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "conv_kernel_size": 3,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
    ),
    "deberta": ("DebertaV2ForSequenceClassification", {**DEBERTA, "pos_att_type": "p2c|c2p"}),
    "mpnet": ("MPNetForSequenceClassification", BERT),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", BART),
    "pegasus": ("PegasusForConditionalGeneration", BART),
    "marian": ("MarianMTModel", BART),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, **ENDS},
    ),
    "neox": ("GPTNeoXForCausalLM", {**BERT, **ENDS, "rotary_pct": 0.25}),
    "neox-sequential": (
        "GPTNeoXForCausalLM",
        {**BERT, **ENDS, "rotary_pct": 0.5, "use_parallel_residual": False},
    ),
    "opt": ("OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}),
    "opt-projected": (
        "OPTForCausalLM",
        {**OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False},
    ),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, **ENDS},
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", WIDE),
    "gemma2": ("Gemma2ForCausalLM", {**WIDE, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "mamba": (
        "MambaForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 6,
            "vocab_size": WORDS,
            "conv_kernel": 3,
            "time_step_rank": 5,
            **ENDS,
        },
    ),
    "rwkv": (
        "RwkvForCausalLM",
        {
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "vocab_size": WORDS,
            "context_length": 64,
            **ENDS,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **BART,
            "num_mel_bins": 10,
            "max_source_positions": 12,
            "max_target_positions": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", WAVE),
    "wav2vec2-stable": (
        "Wav2Vec2ForSequenceClassification",
        {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
}
# fmt: on
PAIRED = {"t5", "t5-gated", "bart", "pegasus", "marian"}  # an encoder and a decoder


def words(count: int = 9) -> Tensor:
    """Two sentences."""
    return torch.randint(5, WORDS, (2, count), generator=torch.Generator().manual_seed(count))


def example_for(name: str) -> dict[str, Tensor]:
    """Inputs of a network."""
    waves = torch.Generator().manual_seed(0)
    if name.startswith("wav2vec2"):
        return {"input_values": torch.randn(2, 200, generator=waves)}
    if name == "whisper":
        sound = torch.randn(2, 10, 24, generator=waves)
        return {"input_features": sound, "decoder_input_ids": words(5)}
    if name in PAIRED:
        return {"input_ids": words(), "decoder_input_ids": words(5)}
    if name == "bert":  # with padding
        return {
            "input_ids": words(),
            "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long(),
        }
    return {"input_ids": words()}


def build(name: str, **changes: Any) -> Any:
    """A network whose every parameter matters."""
    kind = getattr(transformers, ZOO[name][0])
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**ZOO[name][1], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.2 * torch.randn_like(p))
            elif p.std() < 0.1:
                p.copy_(0.2 * torch.randn_like(p))
    return model
