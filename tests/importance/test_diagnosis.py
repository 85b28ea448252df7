"""What a user is told when a calibration is no good."""

import logging
import types

import pytest
import tiny
import torch
from test_gates import make
from test_scoring import rows
from transformers import AlbertConfig, AlbertForSequenceClassification

from hfprune.errors import DataError
from hfprune.importance import diagnosis
from hfprune.importance.moments import MomentSums
from hfprune.importance.scoring import score
from hfprune.importance.sparsity import sparsify
from hfprune.structure.anatomy import Anatomy


def test_the_first_layer_that_is_not_finite_is_named():
    model, batch = make("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[3] = torch.inf
    with pytest.raises(DataError, match=r"batch 0 is nan: encoder\.layer\.1 is the first layer"):
        score(model, [batch])
    assert not any(m._forward_hooks for m in model.modules())


def test_the_layer_is_named_in_a_family_that_cannot_be_pruned():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes, num_hidden_layers=2))
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([1])}
    with torch.no_grad():
        model.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn.bias[3] = torch.inf
    with pytest.raises(DataError, match=r"batch 0 is nan: encoder\.albert_layer_groups\.0 is the"):
        sparsify(model, criterion="taylor", batches=[batch])


def test_labels_that_are_not_finite():
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    model.config.problem_type = "regression"
    _, batch = make("bert")
    batches = [batch | {"labels": torch.full((5, 2), value)} for value in (0.5, torch.nan)]
    with pytest.raises(DataError, match=r"batch 1 is nan: the layers give finite .* its labels"):
        score(model, batches)


def test_halves_that_disagree_are_told(caplog, monkeypatch):
    monkeypatch.setattr(diagnosis, "ALIKE", 0.9999)  # random weights agree better than trained
    model, batch = make("bert")
    batches = [rows(batch, slice(i, i + 1)) for i in range(4)]
    with caplog.at_level(logging.WARNING):
        agreement = score(model, batches, ["fisher"]).agreement["fisher"]
    assert agreement < 0.9999
    (said,) = caplog.messages
    assert f"4 calibration examples rank the units alike only to {agreement:.2f} by fisher" in said
    assert "Score 16 examples or more" in said


def test_a_single_example_is_told(caplog):
    model, batch = make("bert")
    with caplog.at_level(logging.WARNING):
        assert score(model, [rows(batch, slice(0, 1))]).agreement == {}
    (said,) = caplog.messages
    assert "only one calibration example" in said


def test_moments_that_memory_cannot_hold_are_told_before_they_are_gathered(caplog, monkeypatch):
    model, batch = make("bert")
    needed = MomentSums(model).least_bytes(Anatomy.of(model))
    whole = sum(m.nbytes for m in score(model, [batch], ["random"], moments=True).moments.values())
    assert 0.4 * whole < needed < 0.5 * whole  # a constant one stands among the inputs

    def free(available):
        memory = types.SimpleNamespace(available=available)
        monkeypatch.setattr(diagnosis.psutil, "virtual_memory", lambda: memory)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            score(model, [batch, batch], ["reconstruction"])
        return caplog.messages

    assert not free(needed)
    (said,) = free(needed - 1)
    assert "take 0.0 GB or more, and 0.0 GB are free. Other criteria do without" in said


def test_halves_that_agree_need_no_word(caplog):
    model, batch = make("bert")
    with caplog.at_level(logging.WARNING):
        score(model, [rows(batch, torch.tensor([0, 0, 1, 1, 2, 2]))])
        score(model, [batch], ["magnitude"])
    assert not caplog.messages
