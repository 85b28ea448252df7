"""A tiny random model of every family, and a batch that it reads; shared by all tests.

A config is made by overriding sizes by attribute name; `_EXTRAS` holds what a family needs besides.
"""

import functools
import random
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from hfprune.structure.anatomy import Anatomy

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, EXPERTS = 3, 4, 2, 8, 32, 24, 6
VOCABULARY = 64

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("embedding_size", "pooler_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    "attention_heads": HEADS,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "query_pre_attn_scalar"), HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner", "d_ff", "ffn_dim"), WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1),
    "moe_num_experts": EXPERTS,
    "moe_k": 2,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 2 * HEAD_DIM),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 64),
    **dict.fromkeys(("image_size", "max_source_positions"), 16),
    "patch_size": 4,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sliding_window": 4,
}
_TOWERS: dict[str, Any] = {"text_config": _SIZES, "vision_config": _SIZES, "projection_dim": 16}
_PATCHES = {k: v for k, v in _SIZES.items() if k != "image_size"} | {"num_patches": 16}
_IMAGE_TOKEN = VOCABULARY - 1
_READ: dict[str, Any] = {  # images that a text model reads
    "text_config": _SIZES,
    "vision_config": _SIZES,
    "projection_dim": HIDDEN,
    "image_token_index": _IMAGE_TOKEN,
    "image_token_id": _IMAGE_TOKEN,
}
_QWEN_VISION = {
    k: v
    for k, v in _SIZES.items()
    if k in ("hidden_size", "patch_size", "num_heads", "intermediate_size")
} | {
    "depth": LAYERS,
    "embed_dim": HIDDEN,
    "out_hidden_size": HIDDEN,
    "temporal_patch_size": 1,
    "fullatt_block_indexes": [1, 2],
}
_ROPE = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}
_QWEN_VL = _READ | {
    "text_config": _SIZES | {"rope_parameters": _ROPE},
    "vision_config": _QWEN_VISION,
}
_AUDIO: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
_LATENT = {"num_key_value_heads": HEADS, "first_k_dense_replace": 1}
_STARTED = {"decoder_start_token_id": 1}
_EXTRAS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 16, "frequency_stride": 4, "time_stride": 4},
    "beit": {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    "clip": _TOWERS,
    "data2vec-audio": _AUDIO | {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4,
        "share_att_key": False,
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "gemma3": _READ | {"mm_tokens_per_image": 4},
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "granitemoeshared": {"shared_intermediate_size": WIDTH},
    "gptj": {"rotary_dim": 4},
    "hubert": _AUDIO,
    "idefics3": _READ | {"scale_factor": 2},
    "llava": _READ,
    "internvl": _READ | {"downsample_ratio": 0.5},
    "aya_vision": _READ | {"downsample_factor": 2},
    "llava_next": _READ | {"image_grid_pinpoints": [[16, 16]]},
    "llava_onevision": _READ | {"vision_feature_layer": -1, "image_grid_pinpoints": [[16, 16]]},
    "longformer": {"attention_window": [4] * LAYERS},
    "metaclip_2": _TOWERS,
    "mistral3": _READ
    | {"text_config": _SIZES | {"model_type": "mistral"}, "spatial_merge_size": 2},
    "owlv2": _TOWERS,
    "owlvit": _TOWERS,
    "paligemma": _READ
    | {"text_config": {k: v for k, v in _SIZES.items() if k != "sliding_window"}},
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL
    | {
        "vision_config": _QWEN_VISION
        | {"deepstack_visual_indexes": [1], "num_position_embeddings": 16}
    },
    "sew": _AUDIO | {"squeeze_factor": 1},
    "siglip2": _TOWERS | {"vision_config": _PATCHES},
    "siglip2_vision_model": {"num_patches": 16},
    "siglip": _TOWERS,
    "smolvlm": _READ | {"scale_factor": 2},
    "mt5": _STARTED,
    "t5": _STARTED,
    "umt5": _STARTED,
    "unispeech": _AUDIO,
    "unispeech-sat": _AUDIO,
    "wav2vec2": _AUDIO,
    "vivit": {"num_frames": 2, "tubelet_size": [2, 4, 4]},
    "xmod": {"default_language": "en_XX"},
}
GENERATING = (
    *("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText"),
    "AutoModelForCausalLM",
)
_AUTO_CLASSES = (
    *GENERATING[:3],
    "AutoModelForMaskedLM",
    *GENERATING[3:],
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModel",
)


def config(model_type: str) -> PreTrainedConfig:
    """The tiny config of a family."""
    cls = CONFIG_MAPPING[model_type]
    names = cls().to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in names}
    return cls(**sizes | _EXTRAS.get(model_type, {}))


def auto_class(model_type: str) -> str:
    """Name of the auto class that gives a family its most telling task head."""
    kind = CONFIG_MAPPING[model_type]
    reader = kind in transformers.AutoModelForImageTextToText._model_mapping
    if {"text_config", "vision_config"} <= kind.sub_configs.keys() and not reader:
        return "AutoModel"  # the only one that runs both towers
    for name in _AUTO_CLASSES:
        classes = getattr(transformers, name)._model_mapping._model_mapping  # no class is imported
        if isinstance(classes.get(model_type), str):
            return name
    raise LookupError(f"no auto class for {model_type}")


def model(
    model_type: str, head: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of a family in eval mode; the same weights at every call.

    Attention and experts are eager, which every family has. Every trained parameter is random,
    biases and norms too: a surgery that mixes up their rows must show.
    """
    torch.manual_seed(0)
    cls = getattr(transformers, head or auto_class(model_type))
    made = cls.from_config(
        config(model_type), attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in (p for p in made.parameters() if p.requires_grad):
            noise = torch.randn_like(parameter) * 0.2
            parameter.copy_(noise + (parameter.dim() == 1) * 0.5)
        for name, tensor in made.named_buffers():
            if "correction" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.2)
    return made.to(dtype).eval()


def batch(
    model: PreTrainedModel, tokens: int = 9, examples: int = 2, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Two examples that the model reads, or only the first."""
    generator = torch.Generator().manual_seed(seed)
    integers = functools.partial(torch.randint, 3, _IMAGE_TOKEN, generator=generator)
    noise = functools.partial(torch.randn, generator=generator)
    settings = model.config
    vision = getattr(settings, "vision_config", settings)
    if settings.model_type == "longformer":  # whole windows: a padded token's softmax is NaN
        tokens = 12
    inputs: dict[str, torch.Tensor] = {}
    if model.main_input_name == "input_ids":
        inputs["input_ids"] = integers((2, tokens))
        inputs["attention_mask"] = torch.ones(2, tokens, dtype=torch.long)
    if hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        inputs["pixel_values"] = noise(2, 3, height, width)
    if "siglip2" in settings.model_type:  # patches, with how many there are in each direction
        patches = vision.num_patches
        side = int(patches**0.5)
        inputs["pixel_values"] = noise(2, patches, 3 * vision.patch_size**2)
        inputs["pixel_attention_mask"] = torch.ones(2, patches, dtype=torch.long)
        inputs["spatial_shapes"] = torch.full((2, 2), side)
    if model.main_input_name == "input_features":
        frames = settings.max_source_positions
        inputs["input_features"] = noise(2, settings.num_mel_bins, 2 * frames)
    if model.main_input_name == "input_values":
        inputs["input_values"] = noise(2, 200)
    if settings.model_type == "audio-spectrogram-transformer":
        inputs["input_values"] = noise(2, settings.max_length, settings.num_mel_bins)
    if settings.model_type == "vivit":
        inputs["pixel_values"] = noise(2, settings.num_frames, 3, 16, 16)
    if settings.is_encoder_decoder:
        inputs["decoder_input_ids"] = integers((2, 5))
    inputs = {name: tensor[:examples] for name, tensor in inputs.items()}
    if hasattr(settings, "image_token_id"):
        _show(model, inputs, noise)
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _show(model: PreTrainedModel, inputs: dict[str, torch.Tensor], noise: Any) -> None:
    """Give each text an image, and the places where it is read, after its first token."""
    settings, texts = model.config, inputs["input_ids"]
    images: dict[str, torch.Tensor] = {}
    if "pixel_values" in inputs:
        images["pixel_values"] = inputs["pixel_values"]
    if settings.model_type in ("idefics3", "smolvlm"):  # several images for a text
        images["pixel_values"] = images["pixel_values"][:, None]
    if hasattr(settings, "image_grid_pinpoints"):  # the whole and its parts, one of them here
        images["pixel_values"] = images["pixel_values"][:, None].repeat(1, 2, 1, 1, 1)
        images["image_sizes"] = torch.full((len(texts), 2), settings.vision_config.image_size)
    if settings.model_type == "mistral3":
        images["image_sizes"] = torch.full((len(texts), 2), settings.vision_config.image_size)
    if not images:  # the patches of all images in one sequence
        grid = torch.tensor([[1, 4, 4]]).repeat(len(texts), 1)
        features = 3 * settings.vision_config.patch_size**2
        images = {"pixel_values": noise(int(grid.prod(1).sum()), features), "image_grid_thw": grid}
    images["pixel_values"] = images["pixel_values"].to(model.dtype)
    with torch.no_grad():
        seen = model.get_image_features(**images).pooler_output
    rows = sum(part.flatten(0, -2).shape[0] for part in seen)
    places = texts.new_full((len(texts), rows // len(texts)), settings.image_token_id)
    inputs["input_ids"] = torch.cat([texts[:, :1], places, texts[:, 1:]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "image_grid_thw" in images:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == settings.image_token_id).long()
    if settings.model_type == "paligemma":  # the text before what is asked for
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs |= images


def selection(anatomy: Anatomy, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """A random, uneven choice of units; attention n of layer n and the FFN of layer 1 lose all."""
    chance = random.Random(seed)
    keep = {}
    for group in anatomy:
        emptied = group.layer == (1 if group.kind == "neuron" else group.part)
        per_kv = chance.randint(1, group.heads_per_kv)
        kept = 0 if emptied else chance.randint(1, group.kv_groups)
        keep[group.name] = tuple(
            sorted(
                kv * group.heads_per_kv + head
                for kv in chance.sample(range(group.kv_groups), kept)
                for head in chance.sample(range(group.heads_per_kv), per_kv)
            )
        )
    return keep


def outputs(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any
) -> torch.Tensor:
    """What a model says about a batch, as one tensor."""
    return model(**inputs, **options)[0]
