"""A pruned checkpoint goes where a stock one goes: pipelines, the Trainer, no network, a disk."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
import transformers
from test_data import sentences, tiny_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import hfprune
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.surgery import copy_and_cut, cut


def cut_model(family, head=None):
    model = tiny.model(family, head)
    return copy_and_cut(model, tiny.selection(Anatomy.of(model)), {"budget": "first"})


def tokenizer():
    made = tiny_tokenizer()
    made.mask_token = "[UNK]"  # in the vocabulary
    return made


@pytest.mark.parametrize(
    ("task", "family", "head", "options"),
    [
        ("text-classification", "bert", "AutoModelForSequenceClassification", {}),
        ("fill-mask", "bert", "AutoModelForMaskedLM", {}),
        ("text-generation", "llama", None, {"max_new_tokens": 5, "do_sample": False}),
    ],
)
def test_a_pipeline_takes_the_model_and_its_folder(task, family, head, options, tmp_path):
    model, words = cut_model(family, head), tokenizer()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    text = "good [UNK]" if task == "fill-mask" else "good"
    eager = {"attn_implementation": "eager"}
    by_object = transformers.pipeline(task, model=model, tokenizer=words)
    by_folder = transformers.pipeline(
        task, model=str(tmp_path), trust_remote_code=True, model_kwargs=eager
    )
    said = by_object(text, **options)
    assert by_folder(text, **options) == said
    assert Anatomy.of(by_folder.model).groups == Anatomy.of(model).groups
    with pytest.raises((RuntimeError, ValueError, OSError)):
        transformers.pipeline(task, model=str(tmp_path))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_stock_trainer_trains_and_resumes(family, tmp_path):
    words = tokenizer()
    rows = [
        {**words(row["text"], truncation=True, max_length=8), "labels": row["label"]}
        for row in sentences(16)
    ]

    def train(model, steps, **where):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(words)
        )
        trainer.train(**where)
        return trainer.model

    def fresh():
        model = cut_model(family, "AutoModelForSequenceClassification")
        model.config.pad_token_id = words.pad_token_id
        return model

    start = fresh()
    through = train(fresh(), 2)
    resumed = train(fresh(), 2, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in through.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)
    assert any(
        not p.equal(q) for p, q in zip(start.parameters(), through.parameters(), strict=True)
    )
    again = hfprune.from_pretrained(tmp_path / "checkpoint-2")
    for name, tensor in through.state_dict().items():
        assert again.state_dict()[name].equal(tensor)
    layers = Anatomy.of(again).stacks[0]
    cut(again, {layers.name: (0, 2)}, {"budget": "second"}).save_pretrained(tmp_path / "again")
    structure = hfprune.from_pretrained(tmp_path / "again").config.hfprune
    assert structure["lineage"] == [{"budget": "first"}, {"budget": "second"}]


def test_what_a_folder_s_own_code_loaded_is_pruned_again_and_saved(tmp_path):
    """Its class is made of the folder's copy, and the stock class lies below that."""
    model = tiny.model("t5")
    name = "decoder.block.1.layer.1.EncDecAttention"
    copy_and_cut(model, {name: (1, 2, 3)}).save_pretrained(tmp_path / "once")
    auto = transformers.AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(tmp_path / "once", trust_remote_code=True)
    twice = copy_and_cut(loaded, {name: (1, 2)})
    assert type(twice) is type(copy_and_cut(model, {name: (2, 3)}))
    twice.save_pretrained(tmp_path / "twice")
    again = hfprune.from_pretrained(tmp_path / "twice")
    for one, other in zip(twice.parameters(), again.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    "family",
    [
        *("bert", "llama"),
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("t5", "vit", "whisper", "gemma3")),
    ],
)
def test_all_auto_classes_load_one_folder(family, tmp_path):
    model = cut_model(family)
    model.save_pretrained(tmp_path / family)
    served = model.config.auto_map
    assert tiny.auto_class(family) in served and "AutoModel" in served
    saved = model.base_model.state_dict()
    for name in served:
        auto = getattr(transformers, name)
        loaded = auto.from_pretrained(tmp_path / family, trust_remote_code=True)
        again = hfprune.from_pretrained(tmp_path / family, auto_class=auto)
        assert type(again).__name__ == type(loaded).__name__
        for other in (loaded, again):
            tensors = other.base_model.state_dict()
            inside = [key for key in tensors if any(map(str.isdecimal, key.split(".")))]
            assert inside
            for key in inside:
                assert saved[key].equal(tensors[key])


def test_a_class_that_does_not_find_the_layers_is_refused(tmp_path):
    model = cut_model("llama")
    model.save_pretrained(tmp_path)
    assert "AutoModelForQuestionAnswering" not in model.config.auto_map
    with pytest.raises(hfprune.errors.CheckpointError, match="did not come back whole"):
        hfprune.from_pretrained(tmp_path, auto_class=transformers.AutoModelForQuestionAnswering)


@pytest.mark.parametrize("root", ["empty", "another model"])
def test_a_model_may_lie_in_a_subfolder(root, tmp_path):
    if root != "empty":
        tiny.model("llama").save_pretrained(tmp_path)
    model = cut_model("bert")
    model.save_pretrained(tmp_path / "sub", max_shard_size="20KB")
    again = hfprune.from_pretrained(tmp_path, subfolder="sub")
    assert Anatomy.of(again).groups == Anatomy.of(model).groups
    index = tmp_path / "sub" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", "../model-"))
    with pytest.raises(hfprune.errors.CheckpointError, match="files of the same folder"):
        hfprune.from_pretrained(tmp_path, subfolder="sub")


@pytest.mark.parametrize("make", [cut_model, tiny.model])
def test_values_may_be_given_in_place_of_the_configs(make, tmp_path):
    make("bert").save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    model = hfprune.from_pretrained(
        tmp_path, auto, num_labels=3, problem_type="regression", dtype=torch.bfloat16
    )
    assert model.config.num_labels == 3 and model.classifier.out_features == 3
    assert model.config.problem_type == "regression" and model.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="no_such_option"):
        hfprune.from_pretrained(tmp_path, auto, no_such_option=1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"config": tiny.config("bert")}, "does not take config: .*num_labels=2"),
        ({"output_loading_info": True}, "does not take output_loading_info: "),
        ({"auto_class": "AutoModel"}, "auto_class is 'AutoModel'; .*transformers.AutoModel"),
        ({"auto_class": transformers.AutoConfig}, "AutoConfig'>; pass a class"),
    ],
)
def test_arguments_that_a_load_does_not_take_are_refused_by_name(given, says, tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    with pytest.raises(hfprune.errors.HfpruneError, match=says):
        hfprune.from_pretrained(tmp_path, **given)


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("something called the network")
socket.socket.connect = socket.getaddrinfo = refuse
import torch, transformers
folder, way = sys.argv[1:]
if way == "hfprune":
    import hfprune
    model = hfprune.from_pretrained(folder)
else:
    sys.modules["hfprune"] = None
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(3, 12)[None]
with torch.no_grad():
    print(float(model(input_ids=ids).logits.abs().sum()))
"""


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_a_cache_that_was_switched_off_does_not_spoil_the_comparison(family, tmp_path):
    """As the Trainer leaves it; t5's decoder, which has a config of its own, does not notice."""
    model = cut_model(family)
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    assert not hfprune.from_pretrained(tmp_path).config.use_cache


@pytest.mark.slow
@pytest.mark.parametrize("way", ["hfprune", "remote code"])
def test_it_loads_where_there_is_no_network(way, tmp_path):
    model = cut_model("bert")
    model.save_pretrained(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path), way],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )
    with torch.no_grad():
        expected = float(model(input_ids=torch.arange(3, 12)[None]).logits.abs().sum())
    assert float(ended.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "layers", "others"),
    [
        ("bert", "bert.encoder.layer", ("bert.embeddings", "cls")),
        (
            "llama",
            "model.layers",
            ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"),
        ),
    ],
)
def test_a_layer_may_stay_on_the_disk(family, layers, others, tmp_path):
    model = cut_model(family)
    model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys((*others, f"{layers}.0", f"{layers}.2"), "cpu")
    offloaded = hfprune.from_pretrained(
        tmp_path / "model",
        attn_implementation="eager",
        device_map={**parts, f"{layers}.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert any(p.is_meta for p in offloaded.get_submodule(f"{layers}.1").parameters())
    inputs = tiny.batch(model)
    with torch.no_grad():
        assert tiny.outputs(offloaded, inputs).equal(tiny.outputs(model, inputs))
