"""The verdict on every causal language model of Transformers: exact under context parallelism, or refused and why.

`EXACT` maps a family (a `model_type`, with a variant after a slash) to the fields in which its tiny random config
differs from `SIZES`; `tests/hf/test_architectures.py` compares a Trainer's step of each with one process. `REFUSED`
maps a key of `REASONS` to families; the test asserts the message. Every family is in one of them or in `UNTESTED` with
the reason. Families of all supported releases of Transformers are listed: `family_verdicts` tells those of the
installed one.
"""

from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 9,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,
}
TEXT = {key: SIZES[key] for key in list(SIZES)[:16] if "moe" not in key and "expert" not in key and "per_" not in key}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE |= {"image_size": 28, "patch_size": 14}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
AUDIO |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_WINDOWS = {"use_sliding_window": True, "max_window_layers": 1}
MLA = {"head_dim": None, "num_key_value_heads": 4}  # multi-head latent attention: no grouped heads
LLAMA4 = {
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 9,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
}
GEMMA4 = {**TEXT, **WINDOWS, "global_head_dim": 16, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0}
GEMMA4 |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
DECODER = {"is_decoder": True}
GPTJ = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 4}

EXACT: dict[str, dict[str, Any]] = {
    "afmoe": WINDOWS,
    "apertus": {},
    "apertus1p5_text": {},
    "arcee": {},
    "aria_text": {},
    "axk1": MLA,
    "beam": WINDOWS,
    "bert": {},
    "bert/decoder": DECODER,
    "bitnet": {},
    "codegen": GPTJ,
    "cohere": {},
    "cohere2": WINDOWS,
    "cohere2_moe": WINDOWS,
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "cwm": WINDOWS,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "diffllama": {},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": WINDOWS,
    "electra": {},
    "electra/decoder": DECODER,
    "emu3": {"text_config": {**TEXT, "attention_dropout": 0.0}},
    "ernie": {},
    "ernie/decoder": DECODER,
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": WINDOWS,
    "exaone_moe": WINDOWS,
    "flex_olmo": {},
    "flint": {**WINDOWS, "mlp_only_layers": []},
    "fuyu": {"text_config": {**TEXT, "model_type": "persimmon"}, **TEXT},
    "gemma": {},
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 2.0},
    "gemma3": {"text_config": {**TEXT, **WINDOWS}, "vision_config": IMAGE, "mm_tokens_per_image": 4},
    "gemma3_text": WINDOWS,
    "gemma3n_text": {
        **WINDOWS,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma3n_text/shared-keys": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {
        "text_config": GEMMA4,
        "vision_config": {**IMAGE, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
    },
    "gemma4_text": {
        **WINDOWS,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 2,
    },
    "gemma4_unified_text": {**WINDOWS, "global_head_dim": 16},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "got_ocr2": {
        "text_config": TEXT,
        "vision_config": {**IMAGE, "output_channels": 8, "global_attn_indexes": [], "num_pos_feats": 8, "mlp_dim": 16},
    },
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": WINDOWS,
    "gptj": GPTJ,
    "granite": {},
    "granite_swa": WINDOWS,
    "granitemoe": {},
    "granitemoe_swa": WINDOWS,
    "granitemoehybrid/attention": {"layer_types": ["full_attention"] * 2, "mamba_n_heads": 8},
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jetmoe": {},
    "kolibri1": WINDOWS,
    "laguna": {},
    "lfm2/attention": {"layer_types": ["full_attention"] * 2},
    "lfm2_moe/attention": {"layer_types": ["full_attention"] * 2},
    "llama": {},
    "llama4": {"text_config": {**TEXT, **LLAMA4}},
    "llama4_text": LLAMA4,
    "longcat_flash": {
        **MLA,
        "head_dim": 8,
        "ffn_hidden_size": 48,
        "moe_topk": 2,
        "zero_expert_num": 1,
        "expert_ffn_hidden_size": 16,
    },
    "mellum": WINDOWS,
    "mimo_v2_flash": WINDOWS,
    "minicpm3": MLA,
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": WINDOWS,
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": WINDOWS,
    "moss_transcribe_diarize": {
        "text_config": TEXT,
        "audio_config": AUDIO,
    },
    "moshi": {"ffn_dim": 48},
    "nanochat": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWS,
    "olmoe": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": QWEN_WINDOWS,
    "qwen2_moe": QWEN_WINDOWS,
    "qwen3": QWEN_WINDOWS,
    "qwen3_moe": QWEN_WINDOWS,
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "sarvam_mla": MLA,
    "sarvam_moe": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": {},
    "starcoder2": {},
    "vaultgemma": {**WINDOWS, "attn_logit_softcapping": 2.0},
    "youtu": MLA,
}

# The Trainer does not pass the number of targets to these models (`accepts_loss_kwargs = False`).
NO_COUNT = ["gemma4"]

# Families with a router loss, computed if output_router_logits=True.
# fmt: off
ROUTED = [
    "dbrx", "ernie4_5_moe", "flex_olmo", "flint", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid/attention", "granitemoeshared", "jetmoe", "laguna", "mellum", "minimax_m2", "minimax_m3_vl_text",
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
]
# fmt: on
# By release of Transformers: those whose models fail to compute this loss, also in one process, or never do (jetmoe).
ROUTER_LOSS_FAILS = {"5.15": "dbrx granitemoe granitemoe_swa granitemoehybrid/attention granitemoeshared jetmoe"}
ROUTER_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "aux_loss_coef": 0.5}


class Reason(NamedTuple):
    """Why families are refused: the title in docs/models.md, and a regular expression of the message."""

    title: str
    message: str


REASONS: dict[str, Reason] = {
    "state": Reason(
        "recurrent, linear-attention or hybrid layers",
        "They .*carry a state along the sequence or look at",
    ),
    "convolution": Reason(
        "convolutions between tokens",
        "look at neighbouring tokens, which may|look at neighbouring tokens that may",
    ),
    "selection": Reason(
        "keys chosen by an index or summary of the whole sequence", "by an index over|attend to summaries"
    ),
    "interface": Reason("attention that bypasses the interface", "does not call its attention through Transformers'"),
    "name": Reason("attention looked up by name, in Transformers", "^KeyError: 'ring_zigzag'"),
    "positions": Reason("positions counted by the model itself", "computes position ids itself"),
    "loss": Reason("another loss", "does not use the causal language modelling loss"),
    "kwargs": Reason(
        "keyword arguments kept from the attention layers", "does not pass keyword arguments to its attention"
    ),
    "mask": Reason(
        "a mask of their own", "makes its attention mask from the values of|joins the tokens of images in its"
    ),
    "random": Reason("experts drawn at random", "samples experts at random in training"),
    "partner": Reason("part of another model", "attends to images in layers"),
    "unbuilt": Reason("not a causal LM by its configuration", "^AttributeError: 'Musicgen|^StrictDataclassFieldV"),
}
REFUSED: dict[str, str] = {
    "state": """bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_loop_text inkling2_text
        inkling_text jamba kimi_linear lara_mini mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe
        qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma zamba zamba2 zaya""",
    "convolution": "lfm2 lfm2_moe lfm3 phi4_multimodal",
    "selection": "axk2 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm_moe_dsa hy_v4",
    "interface": """bart big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom blt cpmant
        gpt_neox_japanese marian mbart megatron-bert mpt mvp openai-gpt pegasus plbart prophetnet reformer rembert
        roformer rwkv stablelm trocr whisper xglm xlm xlnet xlstm""",
    "name": "falcon git gpt_neo",
    "positions": "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    "loss": "bert-generation",
    "kwargs": "nemotron",
    "mask": "doge gemma4_unified",
    "random": "phimoe",
    "partner": "mllama",
    "unbuilt": "musicgen musicgen_melody",
}
# Families of `EXACT` that were refused before a release of Transformers: that release, and the key of the reason.
REFUSED_BEFORE = {"codegen": ("5.24", "interface"), "gptj": ("5.24", "name")}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256}
INDEXER |= {"indexer_budget": 8, "indexer_compress_ratio": 2}
# Config fields that a refused family needs to be built, or to have the refused property.
REQUIRED_FIELDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "reformer": {"is_decoder": True},
    "nemotron": {"num_key_value_heads": 48},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
}
UNTESTED: dict[str, str] = {
    "gemma3n": "its image encoder needs another package; its text model, `gemma3n_text`, is exact",
    "gemma4_assistant": "it cannot be built by itself",
    "gemma4_unified_assistant": "it cannot be built by itself",
}


def model_class(config_class: type) -> type[PreTrainedModel]:
    """Return the causal language model of a configuration class."""
    entry = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return entry[0] if isinstance(entry, (tuple, list)) else entry


def make(name: str, changes: dict[str, Any], attention: str) -> PreTrainedModel:
    """Return the model of `AutoModelForCausalLM.from_config`, in fp64, with the "eager" implementation of experts.

    Args:
        name: of the family.
        changes: fields of its config.
        attention: the attention implementation.
    """
    config_class = CONFIG_MAPPING[name.split("/")[0]]
    config = config_class(**changes)
    cls = model_class(config_class)
    if cls.config_class is (config.sub_configs or {}).get("text_config"):
        config = config.get_text_config()
    return cls._from_config(config, attn_implementation=attention, experts_implementation="eager").double()


def tiny(name: str, attention: str, dropout: bool = False, **changes: Any) -> PreTrainedModel:
    """Return a random tiny model of a family of `EXACT`, in fp64, with no parameter (norm, bias, sink) at 0 or 1.

    Args:
        name: of the family.
        attention: the attention implementation.
        dropout: keep the dropout of the default config instead of removing it.
        changes: fields of the config.
    """
    config_class = CONFIG_MAPPING[name.split("/")[0]]
    default = config_class()
    known = {*dir(default), *default.attribute_map}
    settings = {key: value for key, value in SIZES.items() if key in known}
    if not dropout:
        settings |= dict.fromkeys(dropouts(default), 0.0)
    settings |= EXACT[name] | changes
    torch.manual_seed(0)
    model = make(name, {key: value for key, value in settings.items() if value is not None}, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def dropouts(config: Any) -> dict[str, float]:
    """Return all dropout probabilities of a config, without those of classification heads."""
    rates = {key: value for key, value in vars(config).items() if "drop" in key and isinstance(value, float)}
    return {key: value for key, value in rates.items() if "classifier" not in key}


def refused(name: str) -> PreTrainedModel:
    """Return a model of a family of `REFUSED` with its default config, without weights."""
    with torch.device("meta"):
        return make(name, REQUIRED_FIELDS.get(name, {}), "ring_zigzag")
