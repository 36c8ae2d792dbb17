"""Tiny configurations of the transformers library, outside of `tests.zoo`: a row for each family."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, PAD, LABELS, ROWS, LENGTH, IMAGE = 99, 1, 3, 4, 8, 7

Batch = dict[str, Tensor]


class Family(NamedTuple):
    """How a family is built and played.

    Attributes:
        kind: what it reads.
        build: returns a fresh model.
        batch: returns a batch, labels included.
        divergence: which suits its head; None where it gives no predictions.
        settings: of solvers that read a representation.
        site: where δ acts; None finds it.
    """

    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    divergence: str | None = "symmetric_kl"
    settings: dict[str, Any] = {}
    site: str | None = None


SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_labels": LABELS,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    **GROUPED,
    "num_local_experts": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 24,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "num_labels": LABELS,
}
PIXELS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": LABELS,
}
SPEECH: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
    "num_labels": LABELS,
}


def made(name: str, head: str, **config: Any) -> Callable[[], nn.Module]:
    """Return what builds the model of a family with a head; None leaves a default."""
    config = {k: v for k, v in config.items() if v is not None}
    return lambda: getattr(transformers, name + head)(
        getattr(transformers, f"{name}Config")(**config)
    )


def labels() -> Tensor:
    """Return a label for each row."""
    return torch.arange(ROWS) % LABELS


def words() -> Batch:
    """Return ids, mask and labels; half of the rows are padded on the right."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (ROWS, LENGTH), generator=draw)
    ids[:, 0] = 3 + labels()
    mask = torch.ones_like(ids)
    mask[::2, -3:] = 0
    ids[:, -1] = ids[::2, -4] = 2
    ids = ids.masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels()}


def unmasked() -> Batch:
    """Return words of models that take no mask."""
    return {k: v for k, v in words().items() if k != "attention_mask"}


def text() -> Batch:
    """Return words whose labels are the words."""
    batch = words()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def images(size: int = 16, channels: int = 3) -> Batch:
    """Return images and labels."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS, channels, size, size, generator=draw)
    return {"pixel_values": pixels, "labels": labels()}


def sounds(masked: bool = True) -> Batch:
    """Return waves and labels; half of the rows end in silence."""
    draw = torch.Generator().manual_seed(0)
    waves, mask = torch.randn(ROWS, 400, generator=draw), torch.ones(ROWS, 400, dtype=torch.long)
    mask[::2, 240:] = 0
    batch = {"input_values": waves * mask, "labels": labels()}
    return {**batch, "attention_mask": mask} if masked else batch


def spectra(length: int, bins: int, name: str = "input_features") -> Batch:
    """Return spectrograms and labels."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, length, bins, generator=draw), "labels": labels()}


def _texts(kind: str, size: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Family]:
    """Return families that classify words."""
    head = "ForSequenceClassification"
    return {n: Family(kind, made(n, head, **{**size, **more}), words) for n, more in rows.items()}


def _causal(kind: str, size: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Family]:
    """Return families that foretell words."""
    head = "ForCausalLM"
    return {n: Family(kind, made(n, head, **{**size, **more}), text) for n, more in rows.items()}


def _vision(rows: dict[str, dict[str, Any]]) -> dict[str, Family]:
    """Return families that classify images."""
    head = "ForImageClassification"
    return {n: Family("vision", made(n, head, **{**PIXELS, **m}), images) for n, m in rows.items()}


FAMILIES: dict[str, Family] = {
    **_texts(
        "text encoder",
        SIZE,
        {
            "XLMRoberta": {},
            "Camembert": {},
            "XLMRobertaXL": {},
            "RobertaPreLayerNorm": {},
            "Data2VecText": {},
            "MPNet": {},
            "MobileBert": {"embedding_size": 16, "intra_bottleneck_size": 16},
            "ConvBert": {"embedding_size": 16, "conv_kernel_size": 3},
            "Deberta": {"relative_attention": True, "pos_att_type": "p2c|c2p"},
            "RoFormer": {"embedding_size": 16},
            "SqueezeBert": {
                "embedding_size": 16,
                "q_groups": 1,
                "k_groups": 1,
                "v_groups": 1,
                "post_attention_groups": 1,
                "intermediate_groups": 1,
                "output_groups": 1,
            },
            "IBert": {},
            "MegatronBert": {},
            "Ernie": {},
            "Nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
            "Yoso": {"use_expectation": True},
            "FNet": {"use_tpu_fourier_optimizations": False},
            "XLM": {"emb_dim": 16, "n_layers": 2, "n_heads": 2},
            "Flaubert": {"emb_dim": 16, "n_layers": 2, "n_heads": 2},
            "XLNet": {
                "max_position_embeddings": None,
                "num_hidden_layers": None,
                "d_model": 16,
                "n_layer": 2,
                "n_head": 2,
                "d_inner": 24,
            },
            "Funnel": {
                "num_hidden_layers": None,
                "max_position_embeddings": None,
                "d_model": 16,
                "block_sizes": [1, 1],
                "n_head": 2,
                "d_head": 8,
                "d_inner": 24,
                "num_decoder_layers": 1,
            },
            "Longformer": {"attention_window": 4},
            "BigBird": {"attention_type": "original_full"},
            "Canine": {
                "num_hash_buckets": 16,
                "local_transformer_stride": 4,
                "upsampling_kernel_size": 2,
                "downsampling_rate": 4,
            },
            "Esm": {"position_embedding_type": "rotary", "mask_token_id": 4},
            "Luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
            "EuroBert": {"num_key_value_heads": 2, "head_dim": 8},
            "NomicBert": {},
            "JinaEmbeddingsV3": {},
        },
    ),
    **_texts(
        "decoder",
        GROUPED,
        {
            "Mistral": {},
            "Qwen2": {},
            "Qwen3": {},
            "Gemma": {},
            "Gemma2": {},
            "Phi": {},
            "Phi3": {},
            "StableLm": {},
            "Starcoder2": {},
            "GPTNeoX": {},
            "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 40},
            "GPTNeo": {
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
            },
            "GPTBigCode": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
            "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 24},
            "Bloom": {"n_layer": 2, "n_head": 2},
            "Falcon": {"head_dim": None},
            "Mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 40},
            "CTRL": {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24, "n_positions": 40},
            "OpenAIGPT": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
            "BioGpt": {},
            "Persimmon": {},
            "Helium": {},
            "Glm": {},
            "SmolLM3": {},
            "Nemotron": {},
        },
    ),
    **_causal(
        "decoder",
        GROUPED,
        {
            "Cohere": {},
            "Olmo": {},
            "Olmo2": {},
            "Granite": {},
            "CodeGen": {
                "n_embd": 16,
                "n_layer": 2,
                "num_attention_heads": 4,
                "head_dim": None,
                "rotary_dim": 2,
                "n_positions": 40,
            },
            "XGLM": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24},
        },
    ),
    **_causal(
        "state space",
        SIZE,
        {
            "Mamba": {"state_size": 4, "expand": 2, "time_step_rank": 2},
            "Mamba2": {
                "state_size": 4,
                "expand": 2,
                "num_heads": 4,
                "head_dim": 8,
                "n_groups": 1,
                "chunk_size": 4,
            },
            "FalconMamba": {"state_size": 4, "time_step_rank": 2},
            "Rwkv": {"attention_hidden_size": 16},
            "RecurrentGemma": {
                "num_key_value_heads": 1,
                "head_dim": 8,
                "lru_width": 16,
                "attention_window_size": 8,
                "num_hidden_layers": 3,
            },
            "Bamba": {
                "num_key_value_heads": 2,
                "mamba_n_heads": 4,
                "mamba_d_head": 8,
                "mamba_d_state": 4,
                "mamba_n_groups": 1,
                "mamba_chunk_size": 4,
                "attn_layer_indices": [1],
            },
        },
    ),
    **_texts(
        "mixture of experts",
        EXPERTS,
        {
            "Mixtral": {},
            "Qwen2Moe": {"shared_expert_intermediate_size": 24},
            "Qwen3Moe": {},
            "MiniMax": {"block_size": 4},
            "Jamba": {
                "mamba_d_state": 4,
                "mamba_dt_rank": 2,
                "use_mamba_kernels": False,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
            },
            "GptOss": {},
        },
    ),
    **_causal(
        "mixture of experts",
        EXPERTS,
        {
            "Olmoe": {},
            "GraniteMoe": {},
            "Phimoe": {},
            "DeepseekV3": {
                "head_dim": None,
                "n_routed_experts": 4,
                "n_group": 2,
                "topk_group": 1,
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 8,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
            },
        },
    ),
}

for _n, _m in {
    "MBart": {},
    "PLBart": {},
    "MT5": {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    "UMT5": {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
}.items():
    FAMILIES[_n] = Family(
        "seq2seq", made(_n, "ForSequenceClassification", **{**SEQ2SEQ, **_m}), words
    )
for _n, _m in {
    "Marian": ("MTModel", {}),
    "Pegasus": ("ForConditionalGeneration", {}),
    "PegasusX": ("ForConditionalGeneration", {"block_size": 4, "num_global_tokens": 2}),
    "Blenderbot": ("ForConditionalGeneration", {}),
    "BlenderbotSmall": ("ForConditionalGeneration", {}),
    "M2M100": ("ForConditionalGeneration", {}),
    "LongT5": (
        "ForConditionalGeneration",
        {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "local_radius": 3},
    ),
    "SwitchTransformers": (
        "ForConditionalGeneration",
        {
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "num_experts": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
    ),
    "NllbMoe": (
        "ForConditionalGeneration",
        {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    ),
}.items():
    FAMILIES[_n] = Family("seq2seq", made(_n, _m[0], **{**SEQ2SEQ, **_m[1]}), text)

_stages = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": LABELS}
FAMILIES |= _vision(
    {
        "ViTMSN": {},
        "DeiT": {},
        "Beit": {},
        "Dinov2": {},
        "Dinov2WithRegisters": {},
        "Data2VecVision": {},
        "Swin": {
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
        },
        "Swinv2": {
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
        },
        "ConvNext": _stages,
        "ConvNextV2": _stages,
        "MobileNetV1": {"depth_multiplier": 0.25, "min_depth": 8},
        "MobileNetV2": {"depth_multiplier": 0.25, "min_depth": 8},
        "PoolFormer": {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "padding": [1, 1],
        },
        "Segformer": {
            "num_encoder_blocks": 2,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 8,
        },
        "Pvt": {
            "num_encoder_blocks": 2,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        "FocalNet": {
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
        },
        "IJepa": {},
    }
)

FAMILIES["ViTMAE"] = Family(
    "vision",
    made(
        "ViTMAE",
        "ForPreTraining",
        **PIXELS,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    ),
    lambda: {"pixel_values": images()["pixel_values"]},
    None,
)

for _n in (
    "Wav2Vec2",
    "Hubert",
    "WavLM",
    "UniSpeech",
    "UniSpeechSat",
    "Data2VecAudio",
    "SEW",
    "Wav2Vec2Conformer",
):
    _more = {"squeeze_factor": 1} if _n == "SEW" else {}
    FAMILIES[_n] = Family(
        "audio", made(_n, "ForSequenceClassification", **{**SPEECH, **_more}), sounds
    )
FAMILIES["AST"] = Family(
    "audio",
    lambda: transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            **PIXELS, max_length=16, num_mel_bins=16, frequency_stride=8, time_stride=8
        )
    ),
    lambda: spectra(16, 16, "input_values"),
)
FAMILIES["Whisper"] = Family(
    "audio",
    made(
        "Whisper",
        "ForAudioClassification",
        **{
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 8,
            "classifier_proj_size": 8,
        },
    ),
    lambda: spectra(8, 16),
)
FAMILIES["Wav2Vec2Bert"] = Family(
    "audio",
    made(
        "Wav2Vec2Bert",
        "ForSequenceClassification",
        **{**SPEECH, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3},
    ),
    lambda: {**spectra(8, 8), "attention_mask": words()["attention_mask"]},
)

_EYES = {
    k: PIXELS[k]
    for k in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
}


def pictured(name: str = "image_token_id", places: int = 4) -> Batch:
    batch = words()
    ids = torch.cat([torch.full((ROWS, places), IMAGE), batch["input_ids"]], 1)
    mask = torch.cat([torch.ones(ROWS, places, dtype=torch.long), batch["attention_mask"]], 1)
    targets = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": targets,
        **{"pixel_values": images()["pixel_values"]},
    }


def _llava(name: str, **more: Any) -> Callable[[], nn.Module]:
    eyes, tongue = transformers.CLIPVisionConfig(**_EYES), transformers.LlamaConfig(**GROUPED)
    config = getattr(transformers, f"{name}Config")
    return lambda: getattr(transformers, f"{name}ForConditionalGeneration")(
        config(vision_config=eyes, text_config=tongue, **more)
    )


def _paligemma() -> nn.Module:
    eyes = transformers.SiglipVisionConfig(**_EYES)
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=eyes,
            text_config=transformers.GemmaConfig(**GROUPED),
            image_token_id=IMAGE,
            projection_dim=16,
            hidden_size=16,
        )
    )


def both() -> Batch:
    return {k: v for k, v in {**words(), **images()}.items() if k != "labels"} | {
        "return_loss": True
    }


_PAIR = {"text_config": {**SIZE}, "vision_config": _EYES, "projection_dim": 8}
FAMILIES |= {
    "Llava": Family("text and image", _llava("Llava", image_token_index=IMAGE), pictured),
    "VipLlava": Family(
        "text and image",
        _llava("VipLlava", image_token_index=IMAGE, vision_feature_layers=[-2, -1]),
        pictured,
    ),
    "PaliGemma": Family("text and image", _paligemma, pictured),
    "CLIP": Family("text and image", made("CLIP", "Model", **_PAIR), both, None),
    "Siglip": Family("text and image", made("Siglip", "Model", **_PAIR), both, None),
    "AltCLIP": Family(
        "text and image",
        made(
            "AltCLIP",
            "Model",
            text_config={**SIZE, "project_dim": 8},
            vision_config=_EYES,
            projection_dim=8,
        ),
        both,
        None,
    ),
    "Blip": Family(
        "text and image",
        made(
            "Blip",
            "ForConditionalGeneration",
            text_config={**SIZE, "encoder_hidden_size": 16},
            vision_config=_EYES,
            projection_dim=8,
        ),
        lambda: {**text(), "pixel_values": images()["pixel_values"]},
    ),
    "Vilt": Family(
        "text and image",
        made("Vilt", "ForQuestionAnswering", **{**SIZE, **PIXELS}),
        lambda: {
            **words(),
            "labels": torch.eye(LABELS)[labels()],
            "pixel_values": images()["pixel_values"],
        },
        "bernoulli",
    ),
    "LayoutLM": Family(
        "text and layout",
        made("LayoutLM", "ForSequenceClassification", **SIZE),
        lambda: {**words(), "bbox": torch.zeros(ROWS, LENGTH, 4, dtype=torch.long)},
    ),
    "Git": Family(
        "text and image",
        made("Git", "ForCausalLM", **SIZE, vision_config=_EYES),
        lambda: {**text(), "pixel_values": images()["pixel_values"]},
        None,
    ),
}
REFUSED: dict[tuple[str, str], str] = {}
