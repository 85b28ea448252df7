"""What goes wrong goes wrong by name: hostile structures, unfit models and selections."""

import contextlib
import copy
import json
import shutil
import tempfile

import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import CLIPVisionModel

from hfprune.errors import CheckpointError, HfpruneError, UnsupportedModelError
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.architectures import REFUSED, ROWS, Row, family_table, register
from hfprune.structure.checkpoint import as_stock, from_pretrained, save_with_processor
from hfprune.structure.cost import counted_macs, layers_macs
from hfprune.structure.modeling_hfprune import (
    ATTRIBUTES,
    KEY,
    PATCHES,
    StructureError,
    checked,
    probe,
    pruned,
)
from hfprune.structure.surgery import copy_and_cut, cut

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
SIZES = st.integers(-3, 40) | st.integers(10**9, 10**30)
CONFIGS = [tiny.config("bert"), tiny.config("t5")]
NAMES = sorted(
    {name for name, _ in tiny.model("bert").base_model.named_modules()}
    | {name for name, _ in tiny.model("t5").base_model.named_modules()}
)
PATHS = st.sampled_from(NAMES) | st.sampled_from(
    ["..", "a..b", "/etc/passwd", "__class__", "config"]
)
COUNTS = sorted(
    {
        name
        for family in ("bert", "t5")
        for module in tiny.model(family).modules()
        for name, value in vars(module).items()
        if type(value) is int
    }
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "shapes": st.dictionaries(
            st.sampled_from(["weight", "bias", "forward"]), st.lists(SIZES, max_size=3), max_size=2
        ),
        "attrs": st.dictionaries(
            st.sampled_from([*COUNTS, "layer_idx", "_modules", "forward", "training"]),
            SIZES,
            max_size=2,
        ),
        "empty": st.sampled_from(["", "o", "dense", "__class__"]),
        "patch": st.fixed_dictionaries(
            {"name": st.sampled_from([*PATCHES]), "heads": st.lists(SIZES, max_size=3)}
        ),
    },
)
slowly = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def build(config, structure):
    """What a load does before it reads weights, on the meta device, where no allocation hurts."""
    config = copy.deepcopy(config)
    setattr(config, KEY, structure)
    cls = type(tiny.model(config.model_type))
    with torch.device("meta"):
        return pruned(cls)(config)


@slowly
@given(ANYTHING)
def test_any_value_is_a_structure_or_an_error(value):
    try:
        checked(value)
    except StructureError as error:
        assert KEY in str(error)


@slowly
@example({"": {"shapes": {"weight": []}}}, CONFIGS[0])
@given(st.dictionaries(PATHS, ENTRY | ANYTHING, min_size=1, max_size=3), st.sampled_from(CONFIGS))
def test_a_hostile_structure_never_grows_a_model(modules, config):
    stock = sum(p.numel() for p in tiny.model(config.model_type).parameters())
    tables = 6 * 32 * tiny.HEADS
    try:
        model = build(config, {"version": 1, "modules": modules})
    except StructureError as error:
        assert KEY in str(error)
    else:
        assert sum(p.numel() for p in model.parameters()) <= stock + tables
        only_what_surgery_writes_differs(model, tiny.model(config.model_type))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned bert's folder, whose config.json the tests may spoil."""
    where = tmp_path_factory.mktemp("hostile")
    model = copy_and_cut(tiny.model("bert"), {"encoder.layer.0.output.dense": range(5)})
    model.save_pretrained(where)
    return where


@contextlib.contextmanager
def spoilt(path, text):
    """A file that says something else for a while."""
    honest = path.read_bytes()
    try:
        path.write_text(text)
        yield
    finally:
        path.write_bytes(honest)


MODULES = st.dictionaries(PATHS, ENTRY | ANYTHING, min_size=1, max_size=3) | ANYTHING
FIELDS = sorted({*CONFIGS[0].to_dict(), "auto_map", "layer_types", "per_layer_config"} - {KEY})
# No large numbers: a config may ask for a billion layers, and is built before any weight is read.
SETTINGS = st.integers(-4, 40) | st.sampled_from(["", "gelu", "int8", "t5", "BertModel"])
SETTINGS |= st.none() | st.booleans() | st.floats() | st.lists(st.integers(-4, 40), max_size=3)
SETTINGS |= st.dictionaries(st.sampled_from(["", "0", "AutoConfig"]), st.integers(-4, 40))


@settings(max_examples=60, deadline=None)
@example({"intermediate_size": -4}, None)
@example({"architectures": [3]}, None)
@example({"architectures": ["ViTForImageClassification"]}, None)
@example({"dtype": "int8"}, None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), SETTINGS | st.lists(SETTINGS, max_size=2), max_size=2),
    st.none() | MODULES,
)
def test_a_hostile_config_file_is_an_error_of_ours(folder, fields, modules):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    if modules is not None:
        config[KEY]["modules"] = modules
    with spoilt(path, json.dumps(config)):
        try:
            model = from_pretrained(folder)
        except CheckpointError as error:
            assert str(folder) in str(error)
        else:
            outlet = model.bert.encoder.layer[0].output.dense.weight
            assert outlet.shape == (tiny.HIDDEN, 5)  # what is in the file, nothing else


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"intermediate_size": -4},
            "its config gives no BertForMaskedLM: RuntimeError: .*negative",
        ),
        ({"num_attention_heads": 0}, "its config gives no BertForMaskedLM: ZeroDivisionError"),
        ({"hidden_size": "many"}, "Validation error for field 'hidden_size'"),
        ({"architectures": [3]}, r"names the classes \[3\].*for bert models. Pass auto_class="),
        ({"architectures": ["ViTForImageClassification"]}, "for bert models. Pass auto_class="),
        ({"architectures": ["PreTrainedModel"]}, "for bert models. Pass auto_class="),
    ],
)
def test_a_config_that_gives_no_model_is_said_with_the_cause(fields, says, folder):
    path = folder / "config.json"
    with (
        spoilt(path, json.dumps(json.loads(path.read_text()) | fields)),
        pytest.raises(CheckpointError, match=says),
    ):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "says"),
    [("config.json", "config.json is not JSON"), ("model.safetensors", "weights are damaged")],
)
def test_a_file_that_ends_early_is_said(file, says, folder):
    with spoilt(folder / file, '{"'), pytest.raises(CheckpointError, match=says):
        from_pretrained(folder)


@pytest.fixture
def sharded(tmp_path):
    """A pruned bert's folder with an index of weights; beside it, outside, the weights again."""
    model = copy_and_cut(tiny.model("bert"), {"encoder.layer.0.output.dense": range(5)})
    model.save_pretrained(tmp_path / "in", verify=False)
    shutil.move(tmp_path / "in" / "model.safetensors", tmp_path / "in" / "all.safetensors")
    shutil.copy(tmp_path / "in" / "all.safetensors", tmp_path / "out.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "all.safetensors")}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    from_pretrained(tmp_path / "in")
    return tmp_path / "in"


@pytest.mark.parametrize(
    "file",
    ["../out.safetensors", "{}/out.safetensors", "..\\out.bin", "C:out.bin", "in/all", "..", "", 3],
)
def test_weights_outside_of_the_folder_are_not_read(file, sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["bert.embeddings.LayerNorm.bias"] = (
        file.format(sharded.parent) if isinstance(file, str) else file
    )
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must be files of the same folder"):
        from_pretrained(sharded)


@pytest.mark.parametrize("named", ["deeper/my.safetensors.index.json", "../out.safetensors", 3])
def test_nor_by_what_the_config_names(named, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../out.safetensors")
    (sharded / "deeper").mkdir()
    (sharded / "deeper" / "my.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((sharded / "config.json").read_text()) | {"transformers_weights": named}
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="must be files of the same folder"):
        from_pretrained(sharded)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {"a": []}}',
        '{"weight_map": []}',
        '{"weight_map": {}, "metadata": 1}',
        "\udcff",
    ],
)
def test_what_is_no_index_of_weights_is_said(index, sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text(index, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="is no index of weights"):
        from_pretrained(sharded)


def test_what_is_not_there_and_what_was_asked_wrongly_is_no_damage(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_implementation"):
        from_pretrained(folder, attn_implementation="no such kernel")


def test_a_family_may_borrow_the_classes_of_another(tmp_path):
    model = tiny.model("exaone")
    model.save_pretrained(tmp_path)
    assert type(from_pretrained(tmp_path)) is transformers.LlamaForCausalLM


RESIZED = {"in_features", "out_features", "nx", "nf", "num_embeddings", "embedding_dim"}


def only_what_surgery_writes_differs(model, stock):
    """Attributes in the table's rows, tensors inside layers along one axis, and what follows from
    their shapes.
    """
    known = {name: vars(module) for name, module in stock.named_modules()}
    for name, module in model.named_modules():
        before = known.get(name, {})
        odd = {k for k, v in vars(module).items() if type(v) is int and v != before.get(k, v)}
        assert odd <= ATTRIBUTES | RESIZED
    shapes = {name: tensor.shape for name, tensor in stock.named_parameters()}
    for name, tensor in model.named_parameters():
        old = shapes.get(name, tensor.shape)
        differing = sum(n != m for n, m in zip(tensor.shape, old, strict=True))
        assert differing <= (1 if any(map(str.isdecimal, name.split("."))) else 0)


def test_every_attribute_that_a_row_lets_surgery_set_may_be_loaded():
    for row in ROWS.values():
        assert row.attributes <= ATTRIBUTES


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ({"embeddings.word_embeddings": {"shapes": {"weight": [9, 32]}}}, "not inside a layer"),
        ({"encoder.layer.0.output.dense": {"shapes": {"weight": [31, 20]}}}, "stock has"),
        ({"encoder.layer.0.attention.self": {"attrs": {"attention_head_size": 4}}}, "stock has"),
        ({"encoder.layer.0.attention.self": {"attrs": {"num_attention_heads": -1}}}, "unusable"),
        ({"encoder.layer.0.attention.self": {"attrs": {"num_attention_heads": 9}}}, "stock has"),
        ({"encoder.layer.0.output.dense": {"attrs": {"in_features": 10**9}}}, "stock has"),
        ({"encoder.layer.0.output.dense": {"attrs": {"in_features": 20}}}, "stock has"),
        (
            {"encoder.layer.0.attention.self": {"patch": {"name": ["bare"], "heads": []}}},
            "unusable",
        ),
        ({"encoder.layer.-1.attention.self": {"attrs": {"num_attention_heads": 1}}}, "layer"),
        ({"encoder.layer.7.output.dense": {"shapes": {"bias": [3]}}}, "does not have"),
        ({"../encoder.layer.0": {"shapes": {"bias": [3]}}}, "does not have"),
    ],
)
def test_a_structure_that_surgery_cannot_have_written_is_refused(modules, says):
    with pytest.raises(StructureError, match=says):
        build(CONFIGS[0], {"version": 1, "modules": modules})


HELPED = {
    "bert": ("encoder.layer.0.attention.self", ()),
    "mpnet": ("encoder.layer.0.attention.attn", ("slice_bias",)),
    "beit": ("layers.0.attention", ("slice_mask",)),
    "bloom": ("h.0.self_attention", ("slice_alibi",)),
    "t5": ("encoder.block.0.layer.0.SelfAttention", ("own_bias", "no_bias")),
    "phi3": ("layers.0.self_attn", ("config_view",)),
}


@pytest.mark.parametrize("family", HELPED)
@pytest.mark.parametrize("how", [{}, {"empty": ""}])
def test_a_patch_that_is_for_another_kind_of_attention_is_refused(family, how):
    path, helpful = HELPED[family]
    for name in PATCHES:
        for heads in ([], [0]):
            modules = {path: how | {"patch": {"name": name, "heads": heads}}}
            if name in helpful:
                build(tiny.config(family), {"version": 1, "modules": modules})
                continue
            with pytest.raises(StructureError, match=f"'{name}' does not help a "):
                build(tiny.config(family), {"version": 1, "modules": modules})


@pytest.mark.parametrize("nf", [20, 10**9])
def test_the_sizes_that_early_checkpoints_say_beside_the_shapes_are_read(nf):
    entry = {"shapes": {"weight": [32, 20], "bias": [20]}, "attrs": {"nf": nf}}
    structure = {"version": 1, "modules": {"h.0.mlp.c_fc": entry}}
    if nf > tiny.WIDTH:
        with pytest.raises(StructureError, match="stock has"):
            build(tiny.config("gpt2"), structure)
    else:
        assert build(tiny.config("gpt2"), structure).transformer.h[0].mlp.c_fc.nf == nf


@pytest.mark.parametrize("version", [2, 10**20])
def test_a_newer_version_is_refused_before_anything_is_built(version, tmp_path):
    model = copy_and_cut(tiny.model("bert"), {"encoder.layer.0.output.dense": range(5)})
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[KEY]["version"] = version
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"version .* Upgrade"):
        from_pretrained(tmp_path)


def test_ignoring_mismatched_sizes_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="random weights"):
        from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_lineage_and_base_travel_with_the_model(tmp_path):
    model = tiny.model("bert")
    model.name_or_path, model.config._commit_hash = "someone/bert", "0123abcd"
    keep = {"encoder.layer.0.output.dense": range(5)}
    model = copy_and_cut(model, keep, {"budget": "macs=50%"})
    model = cut(model, {"encoder.layer.1.output.dense": range(4)}, {"budget": "macs=25%"})
    model.save_pretrained(tmp_path)
    structure = getattr(from_pretrained(tmp_path).config, KEY)
    assert structure["base"] == {"id": "someone/bert", "revision": "0123abcd"}
    assert structure["lineage"] == [{"budget": "macs=50%"}, {"budget": "macs=25%"}]


def test_a_local_base_leaves_no_path_behind(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path / "dense")
    model = from_pretrained(tmp_path / "dense")
    cut(model, {"encoder.layer.0.output.dense": range(5)}).save_pretrained(tmp_path / "pruned")
    assert str(tmp_path) not in (tmp_path / "pruned" / "config.json").read_text()


def test_every_head_loads_from_one_folder(tmp_path):
    model = copy_and_cut(tiny.model("bert"), tiny.selection(Anatomy.of(tiny.model("bert"))))
    model.save_pretrained(tmp_path)
    for head in (
        "AutoModel",
        "AutoModelForSequenceClassification",
        "AutoModelForQuestionAnswering",
    ):
        other = from_pretrained(tmp_path, auto_class=getattr(__import__("transformers"), head))
        assert Anatomy.of(other).groups == Anatomy.of(model).groups


def test_two_classes_without_names_come_back_where_the_family_has_three(tmp_path):
    config = tiny.config("bart")
    config.num_labels = 2
    dense = transformers.BartForSequenceClassification(config)
    save_with_processor(dense, None, tmp_path / "dense")
    copy_and_cut(dense, tiny.selection(Anatomy.of(dense))).save_pretrained(tmp_path / "pruned")
    for folder in ("dense", "pruned"):
        assert from_pretrained(tmp_path / folder).config.num_labels == 2


def test_one_tower_loads_from_a_folder_of_two(tmp_path):
    model = tiny.model("clip")
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    model.save_pretrained(tmp_path)
    tower = pruned(CLIPVisionModel).from_pretrained(tmp_path, attn_implementation="eager")
    pixels = tiny.batch(model)["pixel_values"]
    assert tower(pixels)[0].equal(model.vision_model(pixels)[0])


def test_half_precision_and_shards_come_back(tmp_path):
    model = tiny.model("llama")
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="auto")
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor.to(torch.bfloat16))


def loaded_quantized(model):
    pytest.importorskip("optimum.quanto")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quanto = transformers.QuantoConfig(weights="int8")
        return type(model).from_pretrained(folder, quantization_config=quanto)


def quantized_by_quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    return model


def on_meta(model):
    return model.to("meta")


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=["query"]))


def shared(model):
    first, second = model.bert.encoder.layer[:2]
    second.output.dense = first.output.dense
    return model


@pytest.fixture
def alone(tmp_path):
    """A process group of this process only."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (loaded_quantized, "quantized"),
        (quantized_by_quanto, "quantized"),
        (on_meta, "meta device"),
        (shared, "shares one tensor"),
        (torch.nn.DataParallel, "wraps a BertForMaskedLM"),
        (torch.nn.parallel.DistributedDataParallel, "wraps a BertForMaskedLM"),
        (torch.compile, "wraps a BertForMaskedLM"),
        (fully_shard, "sharded by FSDP"),
        (adapted, "wraps a LoraModel.*PEFT"),
        (lambda model: adapted(model).base_model.model, "PEFT adapters inside"),
    ],
)
def test_what_would_go_wrong_is_refused_by_name_and_before_any_change(change, says, alone):
    model = change(tiny.model("bert"))
    before = {name: (tensor, tensor.shape) for name, tensor in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=says):
        cut(model, {"encoder.layer": (0,)})
    if change is not fully_shard:  # which can be looked at, and scored
        with pytest.raises(UnsupportedModelError, match=says):
            Anatomy.of(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (tensor, shape) in before.items():
        assert after[name] is tensor and tensor.shape == shape


def test_an_unknown_family_names_the_nearest_row():
    config = tiny.config("bert")
    config.model_type = "bertt"
    model = tiny.model("bert")
    model.config = config
    with pytest.raises(UnsupportedModelError, match=r"Did you mean 'bert'.*register"):
        Anatomy.of(model)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_no_row_can_describe_is_refused_with_the_reason(family):
    model = tiny.model("bert")
    model.config.model_type = family
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        Anatomy.of(model)


def test_what_is_not_a_unit_is_said_where_the_anatomy_is_shown():
    for family in ("olmo2", "olmoe", "longformer"):
        assert str(Anatomy.of(tiny.model(family))).endswith(f"Note: {ROWS[family].note}.")
        assert not [g for g in Anatomy.of(tiny.model(family)) if g.kind == "head"]


@pytest.mark.parametrize(
    ("family", "flag", "value", "says"),
    [
        ("stablelm", "qk_layernorm", True, "qk_layernorm set"),
        ("gpt2", "add_cross_attention", True, "add_cross_attention set"),
        ("falcon", "multi_query", False, "multi_query unset"),
        ("mvp", "use_prompt", True, "use_prompt set"),
        ("data2vec-vision", "use_relative_position_bias", True, "use_relative_position_bias set"),
        ("data2vec-vision", "use_shared_relative_position_bias", True, "position_bias set"),
    ],
)
def test_a_variant_outside_its_row_is_refused(family, flag, value, says):
    model = tiny.model(family)
    setattr(model.config, flag, value)
    with pytest.raises(UnsupportedModelError, match=says):
        Anatomy.of(model)


def test_rows_are_not_replaced():
    with pytest.raises(HfpruneError, match="already"):
        register(Row("bert", ROWS["bert"].stacks))


def test_a_new_row_serves_a_new_family():
    register(Row("nicebert", ROWS["bert"].stacks))
    try:
        model = tiny.model("bert")
        model.config.model_type = "nicebert"
        assert Anatomy.of(model).model_type == "nicebert"
    finally:
        del ROWS["nicebert"]


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ({"encoder.layer.9.output.dense": (0,)}, "no such group"),
        ({"encoder.layer.0.output.dense": (0, 99)}, "must be distinct and lie in"),
        ({"encoder.layer.0.output.dense": (1, 1)}, "must be distinct"),
        ({"encoder.layer": ()}, "at least 1 must stay"),
        ({"encoder.layer": (0, 7)}, "must be distinct and lie in"),
    ],
)
def test_a_selection_that_does_not_fit_changes_nothing(selection, says):
    model = tiny.model("bert")
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(HfpruneError, match=says):
        cut(model, selection)
    assert {name: p.shape for name, p in model.named_parameters()} == before


def test_heads_of_kv_groups_go_evenly_and_experts_stay_enough_for_the_router():
    with pytest.raises(HfpruneError, match="same number of query heads"):
        cut(tiny.model("llama"), {"layers.0.self_attn": (0, 1, 2)})
    with pytest.raises(HfpruneError, match="at least 2 must stay of its experts"):
        cut(tiny.model("mixtral"), {"layers.0.mlp.experts": (3,)})


def test_the_given_model_stays_as_it_is():
    dense = tiny.model("phi3")
    inputs = tiny.batch(dense)
    before = tiny.outputs(dense, inputs)
    copy_and_cut(dense, tiny.selection(Anatomy.of(dense)))
    assert tiny.outputs(dense, inputs).equal(before)
    assert not hasattr(dense.config, KEY)


def test_a_pruned_model_can_be_copied_and_its_kernel_changed():
    for family in ("phi3", "bloom", "t5", "mpnet", "gpt2"):
        model = tiny.model(family)
        model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
        twin, inputs = copy.deepcopy(model), tiny.batch(model)
        assert tiny.outputs(twin, inputs).equal(tiny.outputs(model, inputs))


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "bart", "t5"])
def test_an_attention_without_heads_has_its_place_among_the_maps(family):
    model = tiny.model(family)
    groups = [g for g in Anatomy.of(model) if g.kind == "head" and g.stack == g.part == 0]
    model = copy_and_cut(model, {groups[1].name: ()})
    outputs = model(**tiny.batch(model), output_attentions=True)
    maps = outputs.get("encoder_attentions", outputs.get("attentions"))
    assert [layer.shape[1] for layer in maps] == [tiny.HEADS, 0, tiny.HEADS]
    assert torch.cat(maps, dim=1).shape[1] == 2 * tiny.HEADS


def test_upstreams_schema_says_what_it_can(tmp_path):
    model = tiny.model("qwen3")
    keep = {"layers.0.mlp.down_proj": range(10), "layers.2.self_attn": (2, 3)}
    copy_and_cut(model, keep).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}
    assert written == {
        "0": {"intermediate_size": 10},
        "2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    }


@pytest.mark.parametrize(
    "family", ["mistral", "qwen3", "gemma", "bert", "opt", "bart", "idefics3", "qwen2_5_vl"]
)
def test_a_uniform_structure_needs_no_hfprune(family, tmp_path):
    model = tiny.model(family)
    keep = {
        g.name: range(2, 4) if g.kind == "head" else range(10)
        for g in Anatomy.of(model)
        if g.kind == "neuron" or family in ("mistral", "qwen3", "gemma")
    }
    keep |= {b.name: (0, 2) for b in Anatomy.of(model).blocks}
    model = as_stock(copy_and_cut(model, keep))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_hfprune.py").exists()
    auto = getattr(transformers, tiny.auto_class(family))
    plain = auto.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = tiny.batch(model)
    assert tiny.outputs(plain, inputs).equal(tiny.outputs(model, inputs))


@pytest.mark.parametrize(
    "family",
    ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "phimoe", "glm4_moe", "ernie4_5_moe"],
)
def test_equally_many_experts_need_no_hfprune(family, tmp_path):
    model = tiny.model(family)
    keep = {block.name: (0, 2, 5) for block in Anatomy.of(model).experts}
    uneven = copy_and_cut(model, dict([*keep.items()][:1]))
    with pytest.raises(CheckpointError, match="cannot hold this structure"):
        as_stock(uneven)
    model = as_stock(copy_and_cut(model, keep))
    model.save_pretrained(tmp_path)
    plain = getattr(transformers, tiny.auto_class(family)).from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    inputs = tiny.batch(model)
    assert tiny.outputs(plain, inputs).equal(tiny.outputs(model, inputs))


def test_a_structure_that_a_stock_config_cannot_hold_is_refused_and_stays():
    keep = {f"encoder.layer.{n}.output.dense": range(5 + n) for n in range(2)}
    model = copy_and_cut(tiny.model("bert"), keep)
    before = model.config.to_dict()
    with pytest.raises(CheckpointError, match="cannot hold this structure"):
        as_stock(model)
    assert model.config.to_dict() == before
    assert type(model) is pruned(transformers.BertForMaskedLM)


@pytest.mark.parametrize(
    ("family", "kind", "says"),
    [
        ("siglip", "neuron", r"vision_model.head.mlp.fc1 differs.*outside the layers"),
        ("clip", "head", r"text_model.encoder.layers.0.self_attn differs.*head counts"),
        ("bert", "head", r"encoder.layer.0.attention.self.* differs.*head counts"),
    ],
)
def test_uniform_widths_that_a_stock_config_cannot_hold_are_refused_by_name(family, kind, says):
    model = tiny.model(family)
    keep = {g.name: range(2) for g in Anatomy.of(model) if g.kind == kind}
    with pytest.raises(CheckpointError, match=says):
        as_stock(copy_and_cut(model, keep))


def test_a_stock_model_keeps_its_history(tmp_path):
    keep = {g.name: range(5) for g in Anatomy.of(tiny.model("bert")) if g.kind == "neuron"}
    as_stock(copy_and_cut(tiny.model("bert"), keep, {"budget": "a"})).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert type(model) is transformers.BertForMaskedLM
    again = cut(model, {"encoder.layer.0.output.dense": range(4)}, {"budget": "b"})
    assert getattr(again.config, KEY)["lineage"] == [{"budget": "a"}, {"budget": "b"}]


@pytest.mark.parametrize("family", ["bert", "mixtral", "clip"])
def test_the_whole_model_is_counted_whatever_kernels_it_runs(family):
    model = tiny.model(family)
    inputs = tiny.batch(model)
    eager = counted_macs(model, inputs)
    model.set_attn_implementation("sdpa")
    if family == "mixtral":
        model.set_experts_implementation("grouped_mm")
    assert counted_macs(model, inputs) == eager
    for config in (module.config for module in model.modules() if hasattr(module, "config")):
        assert config._attn_implementation == "sdpa"
        assert family != "mixtral" or config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(
    "variant",
    [
        {"share_att_key": True},
        {"pos_att_type": ["c2p"]},
        {"pos_att_type": ["p2c"], "share_att_key": True},
        {"relative_attention": False},
    ],
)
def test_relative_positions_of_deberta_are_counted(variant):
    config = tiny.config("deberta-v2")
    for name, value in variant.items():
        setattr(config, name, value)
    model = transformers.DebertaV2Model(config).eval()
    anatomy = Anatomy.of(model)
    keep = tiny.selection(anatomy)
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    assert counted_macs(model, inputs) == layers_macs(anatomy, 9)
    assert counted_macs(copy_and_cut(model, keep), inputs) == layers_macs(anatomy, 9, keep)


def test_the_table_of_a_model_lists_its_experts():
    lines = str(Anatomy.of(tiny.model("mixtral"))).splitlines()
    (line,) = (line for line in lines if line.startswith("layers.1.mlp.experts"))
    assert line.split()[1:3] == ["experts", str(tiny.EXPERTS)]


@pytest.mark.parametrize(
    ("family", "read"),
    [
        ("llama", "input_ids"),
        ("bart", "input_ids, decoder_input_ids"),
        ("vit", "pixel_values"),
        ("clip", "input_ids, pixel_values"),
        ("siglip2", "input_ids, pixel_values, pixel_attention_mask, spatial_shapes"),
        ("wav2vec2", "input_values"),
        ("hubert", "input_values"),
        ("audio-spectrogram-transformer", "input_values"),
        ("vivit", "pixel_values"),
        ("whisper", "input_features, decoder_input_ids"),
        ("gemma3", "input_ids, pixel_values"),
        ("llava", "input_ids, pixel_values"),
        ("idefics3", "input_ids, pixel_values"),
        ("internvl", "input_ids, pixel_values"),
        ("mistral3", "input_ids, pixel_values, image_sizes"),
        ("qwen2_vl", "input_ids, pixel_values, image_grid_thw, mm_token_type_ids"),
        ("llava_next", "input_ids, pixel_values, image_sizes"),
    ],
)
def test_saving_says_what_it_compared(family, read, tmp_path, caplog):
    model = tiny.model(family)
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    with caplog.at_level("INFO", logger=copy_and_cut.__module__.rpartition(".")[0]):
        model.save_pretrained(tmp_path)
    tensors = len(model.state_dict())
    (said,) = (r.getMessage() for r in caplog.records if "Reloaded" in r.getMessage())
    assert said.endswith(f"{tensors} of {tensors} tensors and the outputs on {read} are equal")


@pytest.mark.parametrize("family", ["wav2vec2", "whisper", "bert"])
def test_saving_notices_what_only_the_outputs_show(family, tmp_path):
    model = tiny.model(family)
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    group = next(g for g in Anatomy.of(model) if g.kind == "neuron")
    outlet = model.base_model.get_submodule(group.outlet)
    # No tensor tells of it, and no norm takes it out again.
    outlet.register_forward_hook(lambda module, args, output: output + output.sin())
    with pytest.raises(StructureError, match="equal tensors but other outputs"):
        model.save_pretrained(tmp_path)


def test_a_backbone_is_compared_by_all_its_maps(tmp_path):
    config = tiny.config("dinov2")
    config.set_output_features_output_indices(out_features=None, out_indices=[1, 3])
    model = transformers.Dinov2Backbone(config)
    copy_and_cut(model, tiny.selection(Anatomy.of(model))).save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, auto_class=transformers.Dinov2Backbone)
    assert len(again(**tiny.batch(again)).feature_maps) == 2


@pytest.mark.parametrize("value", [float("inf"), 3e38])
def test_outputs_that_overflow_are_alike_where_both_do(value, tmp_path):
    model = tiny.model("llama")
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    with torch.no_grad():
        model.lm_head.weight[0] = value
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["gemma", "dinov3_vit"])
def test_a_model_that_was_made_wider_is_saved(family, tmp_path):
    model = tiny.model(family)
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model))).double()
    model.save_pretrained(tmp_path)


def test_a_probe_that_does_not_fit_is_said(tmp_path, caplog):
    model = tiny.model("bert")
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    model.main_input_name = "pixel_values"
    model.config.image_size = 8
    model.save_pretrained(tmp_path)
    assert "No outputs were compared" in caplog.text


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_classifiers_that_read_a_texts_end_are_compared_by_outputs(family, tmp_path, caplog):
    model = tiny.model(family, "AutoModelForSequenceClassification")
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    model.save_pretrained(tmp_path)
    assert "No outputs were compared" not in caplog.text
    inputs = probe(model)
    ends = (inputs["input_ids"] == model.config.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1]  # examples of unlike numbers of ends are refused


def test_the_family_table_lists_every_row():
    table = family_table()
    assert all(f"`{name}`" in table for name in ROWS)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_train_on_a_pruned_model_and_merge_into_it(tmp_path):
    model = tiny.model("llama")
    inputs = tiny.batch(model)
    model = copy_and_cut(model, tiny.selection(Anatomy.of(model)))
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    adapter(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=0.5).step()
    merged = adapter.merge_and_unload()
    expected = tiny.outputs(merged, inputs)
    merged.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, attn_implementation="eager", device_map="cpu")
    assert tiny.outputs(again, inputs).equal(expected)


def test_a_patch_alone_is_not_saved_because_a_stock_load_would_not_notice(tmp_path):
    model = copy_and_cut(tiny.model("t5"), {"encoder.block": (1, 2)})
    with pytest.raises(StructureError, match="No shape differs"):
        model.save_pretrained(tmp_path / "t5")
    assert not (tmp_path / "t5").exists()


def test_dropped_layers_alone_need_no_hfprune(tmp_path):
    model = copy_and_cut(tiny.model("gemma3_text"), {"layers": (0, 2)})
    inputs = tiny.batch(model)
    as_stock(model).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert tiny.outputs(plain, inputs).equal(tiny.outputs(model, inputs))
