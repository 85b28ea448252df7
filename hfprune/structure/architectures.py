"""The table of model families: one declarative row says where a family keeps its prunable parts.

Row key: `config.model_type`. Paths are dotted module names, relative to one layer unless said
otherwise. A row describes modules as transformers builds them in memory, which for some families
differs from the names on disk. Biases are never mentioned: the cut takes a bias along where there
is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from hfprune.errors import HfpruneError, UnsupportedModelError, unknown
from hfprune.structure.modeling_hfprune import ATTRIBUTES


@dataclass(frozen=True)
class Attention:
    """One attention of a layer: its projections, its outlet, the attributes that count its heads.

    Attributes:
        at: module that runs the attention and holds the counts.
        q, k, v: query, key and value projections; with a fused layout `q` is the fused matrix and
            `k`, `v` are ""; where keys and values are cached as one, `k` is it and `v` is "".
        o: the outlet, the projection that mixes the heads back into the residual stream.
        layout: how the output rows lie: "split" in three matrices, "concat" q|k|v blocks of one
            matrix, "per_head" q,k,v of head 0, then of head 1, "per_group" the query heads, k and v
            of KV group 0, then of group 1.
        dim: attribute of `at` with the size of one head.
        heads, kv_heads: attributes of `at` that count query heads and KV groups.
        sizes: attributes of `at` equal to query heads times `dim`.
        groups: attribute of `at` with the number of query heads per KV group.
        follow: further modules whose output rows go with the query heads, where they are present.
        positions: attribute of `at` with half the number of relative positions that tokens are
            compared with; the projections in `follow` are then of positions.
        terms: attribute of `at` that lists these comparisons.
        compared: attribute of `at` with the size of a query, where it is not that of a value.
        window: attribute of `at` with the tokens on either side that a token is compared with; the
            projections in `follow` are then of the few tokens that see all.
        own: parameters of `at` itself with one value per query head, where they are present.
        bias: embedding whose columns are the heads' position biases, where it is present.
        patch: name of the help that the family's forward needs, "" for none (see
            `modeling_hfprune.PATCHES`).
        context: "self", or "cross" when keys and values come from another stack.

    Of the counting attributes, those that `at` has are set.
    """

    at: str
    q: str
    o: str
    k: str = ""
    v: str = ""
    layout: Literal["split", "concat", "per_head", "per_group"] = "split"
    dim: str = "head_dim"
    heads: tuple[str, ...] = ("num_attention_heads", "num_heads", "n_heads")
    kv_heads: tuple[str, ...] = ("num_key_value_heads",)
    sizes: tuple[str, ...] = ()
    groups: str = "num_key_value_groups"
    follow: tuple[str, ...] = ()
    positions: str = ""
    terms: str = ""
    compared: str = ""
    window: str = ""
    own: tuple[str, ...] = ()
    bias: str = ""
    patch: str = ""
    context: Literal["self", "cross"] = "self"


@dataclass(frozen=True)
class Ffn:
    """One feed-forward network: the matrices into its neurons and the outlet out of them.

    Attributes:
        ups: projections whose output rows are the neurons (up, and gate where there is one); those
            that the layer has.
        down: the outlet.
        fused: the one matrix of `ups` holds gate and up as two halves of its rows.
        width: attribute, written "module:attribute", equal to the number of neurons, where present.
        setting: config attribute with the number of neurons, as the family itself names it; "" if
            there is none or two stacks share it.
    """

    ups: tuple[str, ...]
    down: str
    fused: bool = False
    width: str = ""
    setting: str = "intermediate_size"


@dataclass(frozen=True)
class Moe:
    """Routed experts, as transformers holds them in memory: 3-D tensors with one slab per expert.

    Attributes:
        router: module whose weight has one row per expert, and `top_k`.
        experts: module whose every parameter has one slab per expert.
        correction: tensor by which the choice of experts is corrected, one value per expert along
            its last axis; "" for none.
        shared: the FFN that every token passes beside them, in layers that have experts.
    """

    router: str
    experts: str
    correction: str = ""
    shared: Ffn | None = None


@dataclass(frozen=True)
class Stack:
    """One list of layers.

    Attributes:
        layers: path of the ModuleList, relative to `model.base_model`.
        attentions: the attentions of one layer whose heads are units, in forward order.
        ffn: the feed-forward network of one layer, None if its neurons are not units.
        depth: config attributes with the number of layers, those that are present; with the name
            of the sub-config before them if they are in one.
        moe: the routed experts of a layer, where present.
        whole: attentions whose heads are not units, because they are not independent of each other.
        pinned: layers that stay, because they are built unlike the others.
        read: attribute of the model's config that says which layer's output is read; what lies
            after it has no units, and stays: the layer is often counted from the end.
        tapped: attribute of the stack's own config that lists layers whose outputs go to other
            modules too; they stay.
    """

    layers: str
    attentions: tuple[Attention, ...]
    ffn: Ffn | None
    depth: str = "num_hidden_layers"
    moe: Moe | None = None
    whole: tuple[Attention, ...] = ()
    pinned: tuple[int, ...] = ()
    read: str = ""
    tapped: str = ""


@dataclass(frozen=True)
class Row:
    """A model family.

    Attributes:
        model_type: `config.model_type`.
        stacks: its lists of layers.
        unless: config flags that turn the family into something this row does not describe; with
            "!" before it, one whose absence does.
        note: what a user should know about the family, for the table in the README.
    """

    model_type: str
    stacks: tuple[Stack, ...]
    unless: tuple[str, ...] = ()
    note: str = ""

    @property
    def attributes(self) -> set[str]:
        """The attributes that surgery sets, and a load of a pruned model may set."""
        names = {"num_experts"}
        for stack in self.stacks:
            for attention in stack.attentions:
                names |= {*attention.heads, *attention.kv_heads, *attention.sizes}
                names |= {attention.groups} - {""}
            ffns = (stack.ffn, stack.moe and stack.moe.shared)
            names |= {ffn.width.split(":")[1] for ffn in ffns if ffn and ffn.width}
        return names


def _attention(at: str, names: str, **rest: Any) -> Attention:
    """An attention from the names of q, k, v and the outlet ("qkv o" where fused) inside of `at`.

    An outlet that starts with "/" is relative to the layer.
    """
    *inputs, outlet = names.split()
    q, k, v = inputs if len(inputs) == 3 else (*inputs, "", "")
    o = outlet[1:] if outlet.startswith("/") else f"{at}.{outlet}"
    q, k, v = (name and f"{at}.{name}" for name in (q, k, v))
    return Attention(at=at, q=q, k=k, v=v, o=o, **rest)


_BERT_FFN = Ffn(("intermediate.dense",), "output.dense")
_FC = Ffn(("fc1",), "fc2", setting="ffn_dim")
_MLP_FC = Ffn(("mlp.fc1",), "mlp.fc2")
_GATED = Ffn(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", width="mlp:intermediate_size")
_GATED_FUSED = Ffn(("mlp.gate_up_proj",), "mlp.down_proj", fused=True)
_4H = Ffn(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
_4H_FIXED = replace(_4H, setting="")

_QKV_O = "q_proj k_proj v_proj o_proj"
_QKV_OUT = "q_proj k_proj v_proj out_proj"
_BERT_NAMES: dict[str, Any] = {"dim": "attention_head_size", "sizes": ("all_head_size",)}

_BERT = Stack(
    "encoder.layer",
    (_attention("attention.self", "query key value /attention.output.dense", **_BERT_NAMES),),
    _BERT_FFN,
)
_DISTILBERT = Stack(
    "transformer.layer",
    (
        _attention(
            "attention", "q_lin k_lin v_lin out_lin", dim="attention_head_size", sizes=("dim",)
        ),
    ),
    Ffn(("ffn.lin1",), "ffn.lin2", setting="hidden_dim"),
    depth="n_layers",
)
_MPNET = Stack(
    "encoder.layer",
    (_attention("attention.attn", "q k v o", patch="slice_bias", **_BERT_NAMES),),
    _BERT_FFN,
)
_DEBERTA_V2 = Stack(
    "encoder.layer",
    (
        _attention(
            "attention.self",
            "query_proj key_proj value_proj /attention.output.dense",
            follow=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
            positions="pos_ebd_size",
            terms="pos_att_type",
            **_BERT_NAMES,
        ),
    ),
    _BERT_FFN,
)
_LONGFORMER = Stack(
    "encoder.layer",
    (),
    _BERT_FFN,
    whole=(
        _attention(
            "attention.self",
            "query key value /attention.output.dense",
            follow=tuple(f"attention.self.{name}_global" for name in ("query", "key", "value")),
            window="one_sided_attn_window_size",
        ),
    ),
)
_MODERNBERT = Stack(
    "layers",
    (_attention("attn", "Wqkv Wo", layout="concat"),),
    Ffn(("mlp.Wi",), "mlp.Wo", fused=True),
    pinned=(0,),
)

_LLAMA_ATTENTION = _attention("self_attn", _QKV_O)
_LLAMA = Stack("layers", (_LLAMA_ATTENTION,), _GATED)
_GLM = Stack("layers", (_LLAMA_ATTENTION,), _GATED_FUSED)
_PHI = Stack("layers", (_attention("self_attn", "q_proj k_proj v_proj dense"),), _MLP_FC)
_PHI3 = Stack(
    "layers",
    (_attention("self_attn", "qkv_proj o_proj", layout="concat", patch="config_view"),),
    _GATED_FUSED,
)
_STARCODER2 = Stack("layers", (_LLAMA_ATTENTION,), Ffn(("mlp.c_fc",), "mlp.c_proj"))
_OLMO2 = Stack("layers", (), _GATED, whole=(_LLAMA_ATTENTION,))
_EXPERTS = Moe("mlp.gate", "mlp.experts")
_UNGATED = Stack("layers", (_LLAMA_ATTENTION,), _MLP_FC)
_GPT_OSS = Stack(
    "layers",
    (_attention("self_attn", _QKV_O, own=("sinks",)),),
    None,
    moe=Moe("mlp.router", "mlp.experts"),
)
_GRANITE_SHARED = Ffn(
    ("shared_mlp.input_linear",),
    "shared_mlp.output_linear",
    fused=True,
    setting="shared_intermediate_size",
)
_GRANITE_MOE = Stack(
    "layers",
    (_LLAMA_ATTENTION,),
    None,
    moe=Moe("block_sparse_moe.router", "block_sparse_moe.experts"),
)
_MOE = Stack("layers", (_LLAMA_ATTENTION,), _GATED, moe=_EXPERTS)
_OLMOE = Stack("layers", (), None, moe=_EXPERTS, whole=(_LLAMA_ATTENTION,))
_PHIMOE = Stack("layers", (_LLAMA_ATTENTION,), None, moe=Moe("mlp.router", "mlp.experts"))


def _shared(at: str, setting: str) -> Ffn:
    ups = (f"{at}.gate_proj", f"{at}.up_proj")
    return Ffn(ups, f"{at}.down_proj", width=f"{at}:intermediate_size", setting=setting)


_QWEN2_MOE = replace(
    _MOE,
    moe=replace(_EXPERTS, shared=_shared("mlp.shared_expert", "shared_expert_intermediate_size")),
)
_CORRECTED = replace(_EXPERTS, shared=_shared("mlp.shared_experts", ""))
_GLM4_MOE = replace(_MOE, moe=replace(_CORRECTED, correction="mlp.gate.e_score_correction_bias"))
_ERNIE4_5_MOE = replace(
    _MOE, moe=replace(_CORRECTED, correction="mlp.gate.moe_statics.e_score_correction_bias")
)
_LATENT = Attention(
    at="self_attn",
    q="self_attn.q_proj",
    k="self_attn.kv_a_proj_with_mqa",
    o="self_attn.o_proj",
    dim="v_head_dim",
    compared="qk_head_dim",
)
_DEEPSEEK_V2 = replace(_LLAMA, attentions=(), whole=(_LATENT,), moe=_CORRECTED)
_DEEPSEEK_V3 = replace(_DEEPSEEK_V2, moe=_GLM4_MOE.moe)

_GPT2 = Stack(
    "h",
    (_attention("attn", "c_attn c_proj", layout="concat", sizes=("split_size", "embed_dim")),),
    Ffn(("mlp.c_fc",), "mlp.c_proj", setting="n_inner"),
    depth="n_layer",
)
_GPTJ = Stack(
    "h",
    (_attention("attn", _QKV_OUT),),
    Ffn(("mlp.fc_in",), "mlp.fc_out", setting="n_inner"),
    "n_layer",
)
_GPT_NEOX = Stack(
    "layers",
    (_attention("attention", "query_key_value dense", layout="per_head", dim="head_size"),),
    _4H,
)
_BLOOM = Stack(
    "h",
    (
        _attention(
            "self_attention", "query_key_value dense", layout="per_head", patch="slice_alibi"
        ),
    ),
    _4H_FIXED,
    depth="n_layer",
)
_SELF = _attention("self_attn", _QKV_OUT, sizes=("embed_dim",))
_CROSS = _attention("encoder_attn", _QKV_OUT, sizes=("embed_dim",), context="cross")
_FALCON = Stack(
    "h",
    (
        _attention(
            "self_attention", "query_key_value dense", layout="concat", kv_heads=("num_kv_heads",)
        ),
    ),
    _4H_FIXED,
)
_GPT_BIGCODE = Stack(
    "h",
    (
        _attention(
            "attn",
            "c_attn c_proj",
            layout="concat",
            kv_heads=("kv_heads",),
            sizes=("split_size", "embed_dim"),
        ),
    ),
    Ffn(("mlp.c_fc",), "mlp.c_proj", width=":inner_dim", setting="n_inner"),
    depth="n_layer",
)
_GPT_NEO = Stack(
    "h",
    (_attention("attn.attention", _QKV_OUT, sizes=("embed_dim",)),),
    Ffn(("mlp.c_fc",), "mlp.c_proj"),
    depth="num_layers",
)
_OPT = Stack("decoder.layers", (_SELF,), _FC)
_BIOGPT = Stack("layers", (_SELF,), replace(_FC, setting="intermediate_size"))
_BART = (
    Stack(
        "encoder.layers",
        (_SELF,),
        replace(_FC, setting="encoder_ffn_dim"),
        depth="encoder_layers num_hidden_layers",
    ),
    Stack(
        "decoder.layers",
        (_SELF, _CROSS),
        replace(_FC, setting="decoder_ffn_dim"),
        depth="decoder_layers",
    ),
)


def _t5(patch: str, cross_patch: str) -> tuple[Stack, Stack]:
    own, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    counts: dict[str, Any] = {"dim": "key_value_proj_dim", "sizes": ("inner_dim",)}
    bias = f"{own}.relative_attention_bias"
    attention = _attention(own, "q k v o", bias=bias, patch=patch, **counts)
    crossed = _attention(cross, "q k v o", context="cross", patch=cross_patch, **counts)

    def ffn(at: str) -> Ffn:
        return Ffn((f"{at}.wi", f"{at}.wi_0", f"{at}.wi_1"), f"{at}.wo", setting="")

    return (
        Stack("encoder.block", (attention,), ffn("layer.1.DenseReluDense"), "num_layers"),
        Stack(
            "decoder.block",
            (attention, crossed),
            ffn("layer.2.DenseReluDense"),
            "num_decoder_layers",
        ),
    )


_VIT = Stack("layers", (_attention("attention", _QKV_O),), _MLP_FC)
_BEIT = replace(_VIT, attentions=(_attention("attention", _QKV_O, patch="slice_mask"),))
_DINOV2 = Stack("encoder.layer", _VIT.attentions, replace(_MLP_FC, setting=""))
_DINOV3 = Stack("layer", _VIT.attentions, Ffn(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"))
_DATA2VEC_VISION = Stack(
    "encoder.layer",
    (_attention("attention.attention", "query key value /attention.output.dense", **_BERT_NAMES),),
    _BERT_FFN,
)
_TOWER = Stack("encoder.layers", (_SELF,), _MLP_FC)
_CLIP = tuple(
    Stack(f"{side}_model.encoder.layers", (_SELF,), _MLP_FC, f"{side}_config.num_hidden_layers")
    for side in ("text", "vision")
)
_VISION_DEPTH, _TEXT_DEPTH = "vision_config.num_hidden_layers", "text_config.num_hidden_layers"
_READ_BY_TEXT = replace(_TOWER, layers="vision_tower.encoder.layers", depth=_VISION_DEPTH)
_READER = replace(_LLAMA, layers="language_model.layers", depth=_TEXT_DEPTH)
_LLAVA = (replace(_READ_BY_TEXT, read="vision_feature_layer"), _READER)
_INTERNVL = (
    Stack(
        "vision_tower.encoder.layer",
        (_attention("attention", "q_proj k_proj v_proj projection_layer", sizes=("embed_dim",)),),
        _MLP_FC,
        _VISION_DEPTH,
        read="vision_feature_layer",
    ),
    _READER,
)
_MISTRAL3 = (
    Stack(
        "vision_tower.transformer.layers",
        (_attention("attention", _QKV_O, sizes=("embed_dim",)),),
        Ffn(
            ("feed_forward.gate_proj", "feed_forward.up_proj"),
            "feed_forward.down_proj",
            width="feed_forward:intermediate_size",
        ),
        _VISION_DEPTH,
        read="vision_feature_layer",
    ),
    _READER,
)
_PALIGEMMA = (_READ_BY_TEXT, _READER)
_IDEFICS3 = (
    replace(_TOWER, layers="vision_model.encoder.layers", depth=_VISION_DEPTH),
    replace(_LLAMA, layers="text_model.layers", depth=_TEXT_DEPTH),
)
_QWEN_VISION_ATTENTION = _attention("attn", "qkv proj", layout="concat", patch="bare")
_QWEN2_VL = (
    Stack(
        "visual.blocks",
        (_QWEN_VISION_ATTENTION,),
        replace(_MLP_FC, setting=""),
        "vision_config.depth",
    ),
    _READER,
)
_QWEN2_5_VL = (
    Stack("visual.blocks", (_QWEN_VISION_ATTENTION,), _GATED, "vision_config.depth"),
    _READER,
)
_QWEN3_VL = (
    Stack(
        "visual.blocks",
        (_QWEN_VISION_ATTENTION,),
        Ffn(("mlp.linear_fc1",), "mlp.linear_fc2", width="mlp:intermediate_size"),
        "vision_config.depth",
        tapped="deepstack_visual_indexes",
    ),
    replace(_READER, pinned=(0, 1, 2)),  # to which the tapped outputs are added
)
_WAV2VEC2 = Stack(
    "encoder.layers",
    (_attention("attention", _QKV_OUT, sizes=("embed_dim",)),),
    Ffn(("feed_forward.intermediate_dense",), "feed_forward.output_dense"),
)

_COMPRESSED = "heads share one compressed key and value, and are not units"
_IN_GROUPS = "experts that are chosen by groups all stay"
_BIASED = "use_relative_position_bias use_shared_relative_position_bias"
_SHARED_NORM = "query and key norms span all heads, so heads are not independent units"


def _rows(names: str, *stacks: Stack, unless: str = "", note: str = "") -> dict[str, Row]:
    return {name: Row(name, stacks, tuple(unless.split()), note) for name in names.split()}


ROWS: dict[str, Row] = {
    **_rows("bert roberta camembert xlm-roberta electra ernie data2vec-text", _BERT),
    **_rows("roberta-prelayernorm xlm-roberta-xl megatron-bert layoutlm", _BERT),
    **_rows("rembert roc_bert xmod roformer markuplm splinter bert-generation", _BERT),
    **_rows(
        "longformer",
        _LONGFORMER,
        note="its attention takes the width of the hidden states for that of all heads",
    ),
    **_rows("distilbert", _DISTILBERT),
    **_rows("mpnet", _MPNET),
    **_rows("deberta-v2", _DEBERTA_V2),
    **_rows("modernbert", _MODERNBERT),
    **_rows("nomic_bert", _LLAMA),
    **_rows("llama qwen2 qwen3 mistral ministral gemma gemma2 gemma3_text", _LLAMA),
    **_rows("smollm3 granite helium olmo seed_oss ernie4_5 nemotron arcee exaone4", _LLAMA),
    **_rows("exaone", _LLAMA),
    **_rows("gte eurobert hunyuan_v1_dense ministral3 cwm vaultgemma apertus jais2", _LLAMA),
    **_rows("nanochat jina_embeddings_v3", _UNGATED),
    **_rows("cohere", _LLAMA, unless="use_qk_norm"),
    **_rows("cohere2", _LLAMA),
    **_rows("stablelm", _LLAMA, unless="qk_layernorm"),
    **_rows("glm glm4", _GLM),
    **_rows("phi", _PHI),
    **_rows("phi3", _PHI3),
    **_rows("starcoder2", _STARCODER2),
    **_rows("olmo2 olmo3", _OLMO2, note=_SHARED_NORM),
    **_rows("mixtral qwen3_moe", _MOE),
    **_rows("phimoe", _PHIMOE),
    **_rows("granitemoe", _GRANITE_MOE),
    **_rows("granitemoeshared", replace(_GRANITE_MOE, ffn=_GRANITE_SHARED)),
    **_rows("gpt_oss", _GPT_OSS),
    **_rows("olmoe flex_olmo", _OLMOE, note=_SHARED_NORM),
    **_rows("qwen2_moe", _QWEN2_MOE),
    **_rows("glm4_moe dots1", _GLM4_MOE, note=_IN_GROUPS),
    **_rows("ernie4_5_moe", _ERNIE4_5_MOE),
    **_rows("deepseek_v2", _DEEPSEEK_V2, note=f"{_COMPRESSED}; {_IN_GROUPS}"),
    **_rows("deepseek_v3 glm4_moe_lite", _DEEPSEEK_V3, note=f"{_COMPRESSED}; {_IN_GROUPS}"),
    **_rows("gpt2", _GPT2, unless="add_cross_attention scale_attn_by_inverse_layer_idx"),
    **_rows("gptj", _GPTJ),
    **_rows("gpt_neox", _GPT_NEOX),
    **_rows("bloom", _BLOOM),
    **_rows("falcon", _FALCON, unless="new_decoder_architecture alibi !multi_query"),
    **_rows("gpt_bigcode", _GPT_BIGCODE, unless="add_cross_attention !multi_query"),
    **_rows("gpt_neo", _GPT_NEO),
    **_rows("opt", _OPT),
    **_rows("biogpt", _BIOGPT),
    **_rows("bart mbart pegasus marian blenderbot blenderbot-small m2m_100 whisper", *_BART),
    **_rows("plbart", *_BART),
    **_rows("mvp", *_BART, unless="use_prompt"),
    **_rows("t5 mt5", *_t5("own_bias", "no_bias")),
    **_rows("umt5", *_t5("", "")),
    **_rows("vit deit vit_msn ijepa audio-spectrogram-transformer vivit", _VIT),
    **_rows("beit", _BEIT),
    **_rows("dinov2 dinov2_with_registers", _DINOV2, unless="use_swiglu_ffn"),
    **_rows("dinov3_vit", _DINOV3),
    **_rows("data2vec-vision", _DATA2VEC_VISION, unless=_BIASED, note="without position biases"),
    **_rows("siglip_vision_model siglip2_vision_model", _TOWER),
    **_rows("mlcd_vision_model", _TOWER, note="calibrates on batches of one image"),
    **_rows("clip_text_model clip_vision_model", _TOWER),
    **_rows("clip siglip siglip2 metaclip_2 owlvit owlv2", *_CLIP),
    **_rows("llava llava_next llava_onevision aya_vision", *_LLAVA),
    **_rows("internvl", *_INTERNVL),
    **_rows("mistral3", *_MISTRAL3),
    **_rows("gemma3 paligemma", *_PALIGEMMA),
    **_rows("idefics3 smolvlm", *_IDEFICS3),
    **_rows("qwen2_vl", *_QWEN2_VL),
    **_rows("qwen2_5_vl", *_QWEN2_5_VL),
    **_rows("qwen3_vl", *_QWEN3_VL),
    **_rows("wav2vec2 hubert unispeech unispeech-sat data2vec-audio sew", _WAV2VEC2),
}


REFUSED = {
    "blip": "its heads are built of different parts, without one base model that has all layers",
    "albert": "one layer's weights serve all layers, so a cut in one would change the others",
    "esm": "its contact head reads the attention maps of all heads and layers",
    "falcon_h1": "each layer has an attention and a state space, which share its widths",
    "funnel": "its layers come in blocks that halve the number of tokens and may share weights",
    "gemma3n": "its layers share keys and values, and mix several streams of hidden states",
    "jamba": "most of its layers are state spaces, not made of independent heads or neurons",
    "lfm2": "most of its layers are convolutions, not made of independent heads",
    "mamba": "it has no attention, and its state space is not made of independent neurons",
    "mamba2": "it has no attention, and its state space is not made of independent neurons",
    "qwen3_next": "most of its layers have linear attention, whose heads share a convolution",
    "segformer": "its layers come in stages of different widths that hand on merged patches",
    "squeezebert": "its matrices are grouped convolutions, whose rows cannot be cut alone",
    "swin": "its layers come in stages of different widths that hand on merged patches",
    "swinv2": "its layers come in stages of different widths that hand on merged patches",
    "vit_mae": "what it sees of an image is drawn by chance, so two runs cannot be compared",
    "wavlm": "its heads share one position bias that each layer gates for all of them",
    "xlnet": "its projections are tensors of three dimensions, not matrices whose rows are heads",
}
"""Families that no row can describe, and why."""


def register(row: Row) -> None:
    """Add a family to the table.

    Raises:
        HfpruneError: the table has a row of that `model_type` already.
    """
    if row.model_type in ROWS:
        raise HfpruneError(
            f"The table already has a row for model_type {row.model_type!r}; rows are not replaced."
        )
    ROWS[row.model_type] = row
    ATTRIBUTES.update(row.attributes)


def row_of(model_type: str) -> Row:
    """The row of a family.

    Raises:
        UnsupportedModelError: no such row; the message names the nearest one and how to add one, or
            why there can be none.
    """
    if model_type in REFUSED and model_type not in ROWS:
        raise UnsupportedModelError(
            f"Models of type {model_type!r} cannot be pruned: {REFUSED[model_type]}."
        )
    if model_type not in ROWS:
        raise UnsupportedModelError(
            f"{unknown('model family', model_type, ROWS)} A family is added by one row: "
            "hfprune.register(Row(model_type, stacks)); see hfprune/structure/architectures.py."
        )
    return ROWS[model_type]


def family_table() -> str:
    """The supported families as a markdown table, a line per way of being built, for the README."""
    alike: dict[tuple[tuple[Stack, ...], str], list[str]] = {}
    for name, row in ROWS.items():
        alike.setdefault((row.stacks, row.note), []).append(name)
    lines = ["| `model_type` | stacks | units | note |", "|---|---|---|---|"]
    for (stacks, note), names in alike.items():
        units = [
            *(["heads"] if any(stack.attentions for stack in stacks) else []),
            *(["neurons"] if any(stack.ffn for stack in stacks) else []),
            *(["experts"] if any(stack.moe for stack in stacks) else []),
            "layers",
        ]
        paths = ", ".join(f"`{stack.layers}`" for stack in stacks)
        listed = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {listed} | {paths} | {', '.join(units)} | {note} |")
    lines += ["", "Refused by name:", ""]
    lines += [f"- `{name}`: {reason}." for name, reason in REFUSED.items()]
    return "\n".join(lines) + "\n"
