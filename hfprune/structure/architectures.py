"""The table of model families: one declarative row says where a family keeps its prunable parts.

Row key: `config.model_type`. Paths are dotted module names, relative to one layer unless said otherwise. A row describes
modules as transformers builds them in memory, which for some families differs from the names on disk. Biases are
never mentioned: the cut takes a bias along where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hfprune.errors import HfpruneError, UnsupportedModelError, unknown


@dataclass(frozen=True)
class Attention:
    """One attention of a layer: its projections, its outlet and the attributes that count its heads.

    Attributes:
        at: module that runs the attention and holds the counts.
        q, k, v: query, key and value projections; with a fused layout `q` is the fused matrix and `k`, `v` are "".
        o: the outlet, the projection that mixes the heads back into the residual stream.
        layout: how the output rows lie: "split" in three matrices, "concat" q|k|v blocks of one matrix, "per_head"
            q,k,v of head 0, then of head 1, "per_group" the query heads, k and v of KV group 0, then of group 1.
        dim: attribute of `at` with the size of one head.
        heads, kv_heads: attributes of `at` that count query heads and KV groups.
        sizes: attributes of `at` equal to query heads times `dim`.
        groups: attribute of `at` with the number of query heads per KV group.
        follow, follow_kv: further modules whose output rows go with the query heads or the KV groups.
        patch: name of the help that the family's forward needs (see `modeling_hfprune.PATCHES`).
        context: "self", or "cross" when keys and values come from another stack.
    """

    at: str
    q: str
    o: str
    k: str = ""
    v: str = ""
    layout: Literal["split", "concat", "per_head", "per_group"] = "split"
    dim: str = "head_dim"
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    groups: str = ""
    follow: tuple[str, ...] = ()
    follow_kv: tuple[str, ...] = ()
    patch: str = ""
    context: Literal["self", "cross"] = "self"


@dataclass(frozen=True)
class Ffn:
    """One feed-forward network: the matrices into its neurons and the outlet out of them.

    Attributes:
        ups: projections whose output rows are the neurons (up, and gate where there is one).
        down: the outlet.
        fused: the one matrix of `ups` holds gate and up as two halves of its rows.
        widths: attributes, written "module:attribute", equal to the number of neurons.
    """

    ups: tuple[str, ...]
    down: str
    fused: bool = False
    widths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """One list of layers.

    Attributes:
        layers: path of the ModuleList, relative to `model.base_model`.
        attentions: the attentions of one layer, in forward order.
        ffn: the feed-forward network of one layer.
        depth: config attribute with the number of layers.
    """

    layers: str
    attentions: tuple[Attention, ...]
    ffn: Ffn
    depth: str = "num_hidden_layers"


@dataclass(frozen=True)
class Row:
    """A model family: its stacks of layers."""

    model_type: str
    stacks: tuple[Stack, ...]


def _split(at: str, q: str, k: str, v: str, o: str, **rest: object) -> Attention:
    """An attention whose q, k, v (and maybe o) are children of `at`; `o` starting with "/" is relative to the layer."""
    outlet = o[1:] if o.startswith("/") else f"{at}.{o}"
    return Attention(at=at, q=f"{at}.{q}", k=f"{at}.{k}", v=f"{at}.{v}", o=outlet, **rest)  # type: ignore[arg-type]


_BERT = Stack(
    layers="encoder.layer",
    attentions=(
        _split(
            "attention.self",
            "query",
            "key",
            "value",
            "/attention.output.dense",
            dim="attention_head_size",
            heads=("num_attention_heads",),
            sizes=("all_head_size",),
        ),
    ),
    ffn=Ffn(("intermediate.dense",), "output.dense"),
)

_DISTILBERT = Stack(
    layers="transformer.layer",
    attentions=(
        _split(
            "attention",
            "q_lin",
            "k_lin",
            "v_lin",
            "out_lin",
            dim="attention_head_size",
            heads=("n_heads",),
            sizes=("dim",),
        ),
    ),
    ffn=Ffn(("ffn.lin1",), "ffn.lin2"),
    depth="n_layers",
)

_LLAMA_ATTENTION = _split(
    "self_attn", "q_proj", "k_proj", "v_proj", "o_proj", groups="num_key_value_groups"
)
_LLAMA = Stack(
    layers="layers",
    attentions=(_LLAMA_ATTENTION,),
    ffn=Ffn(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", widths=("mlp:intermediate_size",)),
)

_FAMILIES: dict[tuple[str, ...], tuple[Stack, ...]] = {
    ("bert", "roberta"): (_BERT,),
    ("distilbert",): (_DISTILBERT,),
    ("llama", "qwen2", "qwen3", "gemma3_text"): (_LLAMA,),
}

ROWS: dict[str, Row] = {
    name: Row(name, stacks) for names, stacks in _FAMILIES.items() for name in names
}


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


def row_of(model_type: str) -> Row:
    """The row of a family.

    Raises:
        UnsupportedModelError: no such row; the message names the nearest one and how to add one.
    """
    if model_type not in ROWS:
        raise UnsupportedModelError(
            f"{unknown('model family', model_type, ROWS)} A family is added by one row: "
            "hfprune.register(Row(model_type, stacks)); see hfprune/structure/architectures.py."
        )
    return ROWS[model_type]
