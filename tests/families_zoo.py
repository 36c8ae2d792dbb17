"""Tiny configurations of the transformers library, outside of `tests.zoo`: a row for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from tests import zoo
from tests.zoo import LABELS, PAD, VOCABULARY

ROWS, LENGTH, IMAGE = 4, 8, 7

Batch = dict[str, Tensor]


class Family(NamedTuple):
    """How a family is built and played.

    Attributes:
        kind: what it reads.
        build: returns a fresh model.
        batch: returns a batch, labels included.
        divergence: which suits its head.
        settings: of solvers that read a representation.
        site: where δ acts; None finds it.
    """

    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    divergence: str = "symmetric_kl"
    settings: dict[str, Any] = {}  # noqa: RUF012
    site: str | None = None


SIZE: dict[str, Any] = {**zoo.SIZE, "bos_token_id": 0, "eos_token_id": 2}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    **GROUPED,
    "num_local_experts": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 24,
}
SEQ2SEQ: dict[str, Any] = {
    **zoo.SEQ2SEQ,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
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


def text() -> Batch:
    """Return words whose labels are the words."""
    batch = words()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def images() -> Batch:
    """Return images and labels."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS, 3, 16, 16, generator=draw)
    return {"pixel_values": pixels, "labels": labels()}


def sounds() -> Batch:
    """Return waves and labels; half of the rows end in silence."""
    draw = torch.Generator().manual_seed(0)
    waves, mask = torch.randn(ROWS, 400, generator=draw), torch.ones(ROWS, 400, dtype=torch.long)
    mask[::2, 240:] = 0
    return {"input_values": waves * mask, "attention_mask": mask, "labels": labels()}


def spectra(length: int, bins: int, name: str = "input_features") -> Batch:
    """Return spectrograms and labels."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, length, bins, generator=draw), "labels": labels()}


def _texts(kind: str, size: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Family]:
    """Return families that classify words."""
    head = "ForSequenceClassification"
    return {n: Family(kind, made(n, head, **{**size, **more}), words) for n, more in rows.items()}


def _causal(
    kind: str, size: dict[str, Any], rows: dict[str, dict[str, Any]], head: str = "ForCausalLM"
) -> dict[str, Family]:
    """Return families that foretell words."""
    return {n: Family(kind, made(n, head, **{**size, **more}), text) for n, more in rows.items()}


def _vision(rows: dict[str, dict[str, Any]], **settings: Any) -> dict[str, Family]:
    """Return families that classify images."""
    head = "ForImageClassification"
    return {
        n: Family("vision", made(n, head, **{**PIXELS, **more}), images, settings=settings)
        for n, more in rows.items()
    }


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
        },
    ),
}


_T5 = {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
FAMILIES |= _texts("seq2seq", SEQ2SEQ, {"MBart": {}, "PLBart": {}, "MT5": _T5, "UMT5": _T5})
FAMILIES["Marian"] = Family("seq2seq", made("Marian", "MTModel", **SEQ2SEQ), text)
FAMILIES |= _causal(
    "seq2seq",
    SEQ2SEQ,
    {
        "Pegasus": {},
        "PegasusX": {"block_size": 4, "num_global_tokens": 2},
        "Blenderbot": {},
        "BlenderbotSmall": {},
        "M2M100": {},
        "LongT5": {**_T5, "local_radius": 3},
        "NllbMoe": {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    },
    "ForConditionalGeneration",
)

_STAGES = {"depths": [1, 1], "num_hidden_layers": None, "num_attention_heads": None}
_WINDOWS = {**_STAGES, "patch_size": 4, "embed_dim": 8, "num_heads": [2, 2], "window_size": 2}
_CONVOLUTIONS = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
_SHRINKING = {
    **_CONVOLUTIONS,
    "num_encoder_blocks": 2,
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
    "num_attention_heads": [1, 2],
}
FAMILIES |= _vision(
    {
        "ViTMSN": {},
        "DeiT": {},
        "Beit": {},
        "Data2VecVision": {},
        "Dinov2": {},
        "Dinov2WithRegisters": {},
        "IJepa": {},
        "Swin": _WINDOWS,
        "Swinv2": _WINDOWS,
        "FocalNet": {**_WINDOWS, "focal_levels": [1, 1], "focal_windows": [3, 3]},
        "Pvt": {**_SHRINKING, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
    }
)
FAMILIES |= _vision(
    {
        "ConvNext": _CONVOLUTIONS,
        "ConvNextV2": _CONVOLUTIONS,
        "MobileNetV1": {"classifier_dropout_prob": 0.0, "depth_multiplier": 0.25, "min_depth": 8},
        "MobileNetV2": {"depth_multiplier": 0.25, "min_depth": 8},
        "PoolFormer": {**_SHRINKING, "padding": [1, 1]},
        "Segformer": {**_SHRINKING, "sr_ratios": [2, 1], "decoder_hidden_size": 8},
    },
    representation=lambda output: output.last_hidden_state.flatten(2).mean(-1),
)
_EYES = {k: v for k, v in PIXELS.items() if k != "num_labels"}


def pixels() -> Batch:
    """Return images alone."""
    return {"pixel_values": images()["pixel_values"]}


def _frozen(name: str, **more: Any) -> Callable[[], nn.Module]:
    """Return what builds a speech encoder whose feature encoder is not trained."""
    build = made(name, "ForSequenceClassification", **SPEECH, **more)

    def frozen() -> nn.Module:
        model = build()
        model.freeze_feature_encoder()
        return model

    return frozen


SPEAKING: dict[str, dict[str, Any]] = {
    "Wav2Vec2": {},
    "Hubert": {},
    "WavLM": {},
    "UniSpeech": {},
    "UniSpeechSat": {},
    "Data2VecAudio": {},
    "SEW": {"squeeze_factor": 1},
    "Wav2Vec2Conformer": {},
}
FAMILIES |= {n: Family("audio", _frozen(n, **more), sounds) for n, more in SPEAKING.items()}


def _ast() -> nn.Module:
    size = {"max_length": 16, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8}
    return transformers.ASTForAudioClassification(transformers.ASTConfig(**PIXELS, **size))


_WHISPER = {
    **SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 8,
    "classifier_proj_size": 8,
}
_BERT = {"feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3}
FAMILIES |= {
    "AST": Family("audio", _ast, lambda: spectra(16, 16, "input_values")),
    "Whisper": Family(
        "audio",
        made("Whisper", "ForAudioClassification", **_WHISPER),
        lambda: spectra(8, 16),
        settings={"source": "encoder"},
    ),
    "Wav2Vec2Bert": Family(
        "audio",
        made("Wav2Vec2Bert", "ForSequenceClassification", **SPEECH, **_BERT),
        lambda: {**spectra(8, 8), "attention_mask": words()["attention_mask"]},
    ),
}


def pictured(places: int = 4) -> Batch:
    """Return words behind the places of an image, and the images."""
    batch = words()
    ids = torch.cat([torch.full((ROWS, places), IMAGE), batch["input_ids"]], 1)
    mask = torch.cat([torch.ones(ROWS, places, dtype=torch.long), batch["attention_mask"]], 1)
    targets = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": targets, **pixels()}


def beside() -> Batch:
    """Return words that are foretold, and images beside them."""
    return {**text(), **pixels()}


def pairs() -> Batch:
    """Return words and images, of models that tell which belong together."""
    batch = words()
    del batch["labels"]
    return {**batch, **pixels(), "return_loss": torch.tensor(True)}


def answers() -> Batch:
    """Return words, images and a score for each answer."""
    return {**words(), **pixels(), "labels": torch.eye(LABELS)[labels()]}


def boxes() -> Batch:
    """Return words and where they lie on a page."""
    return {**words(), "bbox": torch.zeros(ROWS, LENGTH, 4, dtype=torch.long)}


def _llava(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        eyes, tongue = transformers.CLIPVisionConfig(**_EYES), transformers.LlamaConfig(**GROUPED)
        config = getattr(transformers, f"{name}Config")
        model = getattr(transformers, f"{name}ForConditionalGeneration")
        return model(config(vision_config=eyes, text_config=tongue, image_token_id=IMAGE, **more))

    return build


def _paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_EYES),
        text_config=transformers.GemmaConfig(**GROUPED),
        image_token_id=IMAGE,
        projection_dim=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _paired(name: str, **more: Any) -> Callable[[], nn.Module]:
    tongue = {**SIZE, **more}
    return made(name, "Model", text_config=tongue, vision_config=_EYES, projection_dim=8)


_BLIP = {
    "text_config": {**SIZE, "encoder_hidden_size": 16},
    "vision_config": _EYES,
    "projection_dim": 8,
}
_BOTH = "text and image"
_TEXT = {"representation": lambda output: output.text_embeds}
_CLIP = _paired("CLIP")
_ALT = _paired("AltCLIP", project_dim=8)
_CANINE = made(
    "Canine",
    "ForSequenceClassification",
    **SIZE,
    num_hash_buckets=16,
    local_transformer_stride=4,
    upsampling_kernel_size=2,
    downsampling_rate=4,
)
_VILT = made("Vilt", "ForQuestionAnswering", **{**SIZE, **PIXELS})
FAMILIES |= {
    "Llava": Family(_BOTH, _llava("Llava"), pictured),
    "VipLlava": Family(_BOTH, _llava("VipLlava", vision_feature_layers=[-2, -1]), pictured),
    "PaliGemma": Family(_BOTH, _paligemma, pictured),
    "CLIP": Family(
        _BOTH, _CLIP, pairs, settings=_TEXT, site="text_model.embeddings.token_embedding"
    ),
    "Siglip": Family(_BOTH, _paired("Siglip"), pairs, settings=_TEXT),
    "AltCLIP": Family(
        _BOTH, _ALT, pairs, settings=_TEXT, site="text_model.roberta.embeddings.word_embeddings"
    ),
    "Blip": Family(
        _BOTH,
        made("Blip", "ForConditionalGeneration", **_BLIP),
        beside,
        site="text_decoder.bert.embeddings.word_embeddings",
        settings={"source": "text_decoder.bert"},
    ),
    "Vilt": Family(_BOTH, _VILT, answers, "bernoulli"),
    "Git": Family(_BOTH, made("Git", "ForCausalLM", **SIZE, vision_config=_EYES), beside),
    "LayoutLM": Family(
        "text and layout", made("LayoutLM", "ForSequenceClassification", **SIZE), boxes
    ),
    "Canine": Family("text encoder", _CANINE, words, site="canine.char_embeddings"),
}

_TRAINED = "freeze the feature encoder (model.freeze_feature_encoder())"
_SEVERAL = "Name the one that δ is added to with site=."
REFUSED: dict[str, tuple[Family, str]] = {
    "Canine, no site named": (Family("text encoder", _CANINE, words), _SEVERAL),
    "CLIP, no site named": (Family(_BOTH, _CLIP, pairs), _SEVERAL),
    "AltCLIP, no site named": (Family(_BOTH, _ALT, pairs), _SEVERAL),
    **{
        f"{name}, feature encoder trained": (
            Family("audio", made(name, "ForSequenceClassification", **SPEECH, **more), sounds),
            _TRAINED,
        )
        for name, more in SPEAKING.items()
    },
}
"""What is refused as it is, and part of what the error says."""

CANNOT: dict[tuple[str, str], str] = {
    (name, solver): "compares predictions, and the closure returned a loss alone"
    for name in ("CLIP", "Siglip", "AltCLIP")
    for solver in ("smart", "mat")
}
"""Solvers that a family cannot play, and part of what the error says."""
