"""The distillation losses against hand computation, and training against an explicit loop."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hfprune.errors import CheckpointError, DataError, RecipeError
from hfprune.recovery.distillation import DistillationArguments, DistillationTrainer, distill
from hfprune.recovery.losses import Divergence, spread_layers
from hfprune.recovery.parts import without_dropout
from tests import tiny
from tests.launching import leave, succeed, together
from tests.trained import At

VOCABULARY = 40
CLASSES = 3
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {"hidden_size": 16, "num_attention_heads": 2, "num_labels": CLASSES}


def bert(cls=BertForSequenceClassification, width=32, layers=2, **changes):
    settings = {**ENCODER, **NO_DROPOUT, **changes}
    config = BertConfig(
        vocab_size=VOCABULARY, intermediate_size=width, num_hidden_layers=layers, **settings
    )
    return cls(config)


def llama(width=32, vocabulary=VOCABULARY):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
        )
    )


def t5(width=32):
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_ff=width,
            d_kv=8,
            num_heads=2,
            num_layers=2,
            num_decoder_layers=1,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def vit(width=32, **changes):
    settings = {**ENCODER, **NO_DROPOUT, **changes}
    return ViTForImageClassification(
        ViTConfig(
            intermediate_size=width, num_hidden_layers=2, image_size=8, patch_size=4, **settings
        )
    )


def pair(make, **changes):
    """A student with half the neurons of its teacher."""
    torch.manual_seed(0)
    return make(width=16, **changes), make(width=32, **changes)


def examples(make, count=16):
    """Examples of unequal length, and for token-level tasks of unequal numbers of labels."""
    generator = torch.Generator().manual_seed(1)

    def integers(high, size):
        return torch.randint(1, high, (size,), generator=generator).tolist()

    made = []
    for index in range(count):
        length = 3 + index % 5
        if make is vit:
            image = torch.randn(3, 8, 8, generator=generator)
            made.append({"pixel_values": image, "labels": index % CLASSES})
            continue
        example = {"input_ids": integers(VOCABULARY, length), "attention_mask": [1] * length}
        if make is bert:
            example["labels"] = index % CLASSES
        elif make is llama:  # the prompt is masked; some examples have one target only
            example["labels"] = [-100] * (length - 1 - index % 2) + integers(
                VOCABULARY, 1 + index % 2
            )
        else:
            example["labels"] = integers(VOCABULARY, 2 + index % 3)
        made.append(example)
    return made


def collate(rows):
    """Pad on the right to the longest row."""
    fill = {"input_ids": 0, "attention_mask": 0, "input_values": 0, "labels": -100}
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].dim() == 1:
            longest = max(len(value) for value in values)
            values = [F.pad(value, (0, longest - len(value)), value=fill[name]) for value in values]
        batch[name] = torch.stack(values)
    return batch


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return DistillationArguments(**settings)


def trainer_of(
    student, teacher, folder, dataset=None, layer_map=None, outlets=None, teacher_cache=None,
    **changes,
):  # fmt: skip
    return DistillationTrainer(
        student,
        teacher,
        arguments(folder, **changes),
        layer_map=layer_map,
        attention_outlets=outlets,
        teacher_cache=teacher_cache,
        train_dataset=dataset,
        data_collator=collate,
    )


def part(student, teacher, batch, folder, name, **changes):
    """One part of the loss on one batch, as the trainer computes it."""
    names = ("task", "logits", "hidden", "attention", "embedding")
    weights = {f"{each}_weight": 0.0 for each in names}
    trainer = trainer_of(student, teacher, folder, **{**weights, f"{name}_weight": 1.0}, **changes)
    student.train()
    return trainer.compute_loss(student, dict(batch))


def kl(teacher, student, temperature=2.0):
    """KL(teacher || student) of two vectors of logits, as a plain sum."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum()


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=name, **tolerance)


# The losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "reverse", "skewed"])
def test_divergence_is_the_textbook_formula(kind):
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    first, second = {
        "forward": (p, q),
        "reverse": (q, p),
        "skewed": (p, 0.2 * p + 0.8 * q),
    }[kind]
    expected = 9 * F.kl_div(second.log(), first, reduction="none").sum(-1)
    torch.testing.assert_close(Divergence(kind, 3.0, 0.2)(student, teacher), expected)


def test_layers_are_spread_with_the_last_aligned():
    assert spread_layers(4, 4) == (0, 1, 2, 3)
    assert spread_layers(3, 6) == (1, 3, 5)
    assert spread_layers(2, 5) == (2, 4)


@pytest.mark.parametrize("make", [bert, vit])
def test_classification_logits_use_every_example(make, tmp_path):
    student, teacher = pair(make)
    batch = collate(examples(make, 5))
    expected = [
        kl(theirs, ours)
        for theirs, ours in zip(teacher(**batch).logits, student(**batch).logits, strict=True)
    ]
    torch.testing.assert_close(
        part(student, teacher, batch, tmp_path, "logits"), sum(expected) / len(expected)
    )


def test_unlabelled_batches_can_be_distilled_for_classification(tmp_path):
    student, teacher = pair(bert)
    batch = collate(examples(bert, 5))
    labelled = part(student, teacher, batch, tmp_path, "logits")
    del batch["labels"]
    torch.testing.assert_close(part(student, teacher, batch, tmp_path, "logits"), labelled)
    with pytest.raises(DataError, match="no labels"):
        part(student, teacher, batch, tmp_path, "task")


def test_causal_logits_count_the_positions_whose_next_label_counts(tmp_path):
    student, teacher = pair(llama)
    batch = collate(examples(llama, 6))
    ours, theirs, labels = student(**batch).logits, teacher(**batch).logits, batch["labels"]
    expected = [
        kl(theirs[row, at], ours[row, at])
        for row in range(labels.shape[0])
        for at in range(labels.shape[1] - 1)
        if labels[row, at + 1] != -100
    ]
    assert 6 < len(expected) < labels.numel() / 2
    torch.testing.assert_close(
        part(student, teacher, batch, tmp_path, "logits"), sum(expected) / len(expected)
    )


def tagger(width):
    return bert(BertForTokenClassification, width)


def masked_lm(width):
    return bert(BertForMaskedLM, width)


@pytest.mark.parametrize("make", [t5, masked_lm, tagger])
def test_unshifted_token_logits_count_the_labelled_positions(make, tmp_path):
    student, teacher = pair(make)
    batch = collate(examples(t5, 4))
    if make is not t5:  # as many masked words, or first pieces of words, as chance will have it
        labels = batch["input_ids"] % (CLASSES if make is tagger else VOCABULARY)
        batch["labels"] = torch.where(batch["input_ids"] > 20, labels, -100)
    ours, theirs = student(**batch).logits, teacher(**batch).logits
    where = (batch["labels"] != -100).nonzero().tolist()
    expected = [kl(theirs[row, at], ours[row, at]) for row, at in where]
    torch.testing.assert_close(
        part(student, teacher, batch, tmp_path, "logits"), sum(expected) / len(expected)
    )


def test_span_logits_leave_padding_out(tmp_path):
    student, teacher = pair(lambda width: bert(BertForQuestionAnswering, width, num_labels=2))
    batch = collate(examples(bert, 5))
    del batch["labels"]
    lengths = batch["attention_mask"].sum(1).tolist()
    ours, theirs = student(**batch), teacher(**batch)
    expected = [
        kl(theirs[end][row, :length], ours[end][row, :length])
        for row, length in enumerate(lengths)
        for end in ("start_logits", "end_logits")
    ]
    torch.testing.assert_close(
        part(student, teacher, batch, tmp_path, "logits"), sum(expected) / len(expected)
    )
    batch |= {"start_positions": torch.ones(5).long(), "end_positions": torch.ones(5).long()}
    torch.testing.assert_close(
        part(student, teacher, batch, tmp_path, "task"), student(**batch).loss
    )


@pytest.mark.parametrize("told", ["multi_label_classification", None])
def test_multi_label_and_regression_logits(told, tmp_path):
    student, teacher = pair(bert, problem_type=told)  # not told, the labels say it
    batch = collate(examples(bert, 4))
    del batch["labels"]
    p, q = ((model(**batch).logits / 2).sigmoid() for model in (teacher, student))
    batch["labels"] = torch.eye(4)[:, :CLASSES]
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    torch.testing.assert_close(
        part(student, teacher, batch, tmp_path, "logits"), expected.mean(), rtol=1e-4, atol=1e-7
    )

    student, teacher = pair(bert, num_labels=1)
    batch["labels"] = torch.randn(4)
    expected = F.mse_loss(student(**batch).logits, teacher(**batch).logits)
    torch.testing.assert_close(part(student, teacher, batch, tmp_path, "logits"), expected)


@pytest.mark.parametrize("layer_map", [None, (0, 3)])
def test_hidden_states_skip_padding_and_follow_the_layer_map(layer_map, tmp_path):
    torch.manual_seed(0)
    student, teacher = bert(layers=2), bert(layers=4)
    batch = collate(examples(bert, 5))
    ours = student(**batch, output_hidden_states=True).hidden_states
    theirs = teacher(**batch, output_hidden_states=True).hidden_states
    errors = [
        (ours[layer + 1][row, at] - theirs[source + 1][row, at]).square().mean()
        / theirs[source + 1][row, at].square().mean()
        for layer, source in enumerate(layer_map or (1, 3))
        for row, at in batch["attention_mask"].nonzero().tolist()
    ]
    loss = part(student, teacher, batch, tmp_path, "hidden", layer_map=layer_map)
    torch.testing.assert_close(loss, sum(errors) / len(errors))


def test_logits_that_nobody_reads_are_not_computed(tmp_path):
    torch.manual_seed(0)
    student, teacher = llama(), llama()
    batch, seen = collate(examples(llama, 3)), []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    alone = part(student, teacher, batch, tmp_path / "alone", "hidden")
    assert seen == [1, 1]
    part(student, teacher, batch, tmp_path / "logits", "logits")
    assert seen[2:] == [batch["input_ids"].shape[1]] * 2
    ours = student(**batch, output_hidden_states=True).hidden_states
    theirs = teacher(**batch, output_hidden_states=True).hidden_states
    errors = [
        (ours[layer][row, at] - theirs[layer][row, at]).square().mean()
        / theirs[layer][row, at].square().mean()
        for layer in (1, 2)
        for row, at in batch["attention_mask"].nonzero().tolist()
    ]
    torch.testing.assert_close(alone, sum(errors) / len(errors))


def test_decoder_states_count_by_the_labels(tmp_path):
    student, teacher = pair(t5)
    batch = collate(examples(t5, 4))
    ours = student(**batch, output_hidden_states=True)
    theirs = teacher(**batch, output_hidden_states=True)
    layers = []
    for name, mask in (
        ("encoder_hidden_states", batch["attention_mask"] == 1),
        ("decoder_hidden_states", batch["labels"] != -100),
    ):
        for left, right in zip(ours[name][1:], theirs[name][1:], strict=True):
            left, right = left[mask], right[mask]
            layers.append(((left - right).square().mean(-1) / right.square().mean(-1)).mean())
    assert len(layers) == 3
    torch.testing.assert_close(
        part(student, teacher, batch, tmp_path, "hidden"), sum(layers) / len(layers)
    )


def encoder(width=32, hidden=16):
    return bert(BertModel, width, hidden_size=hidden)


def embeddings(model, batch):
    """Mean over the tokens of each text, one at a time and without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    with torch.no_grad():
        return torch.stack(
            [
                model(input_ids=batch["input_ids"][row : row + 1, :length])[0][0].mean(0)
                for row, length in enumerate(lengths)
            ]
        )


def texts(count=16):
    return [{k: v for k, v in row.items() if k != "labels"} for row in examples(bert, count)]


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_sentence_embeddings_are_means_over_the_tokens(distance, tmp_path):
    student, teacher = pair(encoder)
    batch = collate(texts(5))
    ours, theirs = embeddings(student, batch), embeddings(teacher, batch)
    if distance == "cosine":
        norms = ours.norm(dim=1) * theirs.norm(dim=1)
        expected = (1 - (ours * theirs).sum(1) / norms).mean()
    else:
        expected = ((ours - theirs).square().mean(1) / theirs.square().mean(1)).mean()
    loss = part(student, teacher, batch, tmp_path, "embedding", embedding_distance=distance)
    torch.testing.assert_close(loss, expected)


def test_an_encoder_learns_embeddings_and_is_judged_by_them(tmp_path):
    student, teacher = pair(encoder)
    rows, seen = texts(), []

    def judge(prediction):
        seen.append(torch.as_tensor(prediction.predictions))
        return {"far": 1.0}

    args = arguments(
        tmp_path,
        task_weight=0.0,
        logits_weight=0.0,
        hidden_weight=0.0,
        embedding_weight=1.0,
        max_steps=12,
        save_strategy="steps",
        save_steps=6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
    )
    trainer = distill(student, teacher, rows, rows, args=args, data_collator=collate,
                      compute_metrics=judge)  # fmt: skip
    batch = collate(rows)
    found, wanted = embeddings(student.eval(), batch), embeddings(teacher, batch)
    assert trainer.metrics["kept_step"] == 12
    torch.testing.assert_close(seen[-1], found, rtol=1e-4, atol=1e-5)
    first = 1 - F.cosine_similarity(seen[0], wanted).mean()
    last = 1 - F.cosine_similarity(found, wanted).mean()
    assert last < 0.5 * first
    history = json.loads((tmp_path / "checkpoint-12/trainer_state.json").read_text())
    judged = [log["eval_loss"] for log in history["log_history"] if "eval_loss" in log]
    assert judged == pytest.approx([first.item(), judged[1], last.item()], rel=1e-3)


def test_accumulated_embeddings_are_those_of_the_whole_batch(tmp_path):
    weighed = {"task_weight": 0.0, "logits_weight": 0.0, "hidden_weight": 0.0}
    found = []
    for accumulation in (1, 4):
        student, teacher = pair(encoder)
        changes = {
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "embedding_weight": 1.0,
        }
        trainer_of(student, teacher, tmp_path, texts(), max_steps=2, **weighed, **changes).train()
        found.append(weights(student))
    assert_close(*found, rtol=1e-4, atol=1e-6)


def test_predictions_are_not_asked_of_a_model_without_a_head(tmp_path):
    student, teacher = pair(encoder)
    with pytest.raises(RecipeError, match="nothing for logits_weight: set them to 0 and embedding"):
        trainer_of(student, teacher, tmp_path, task_weight=0.0)
    with pytest.raises(DataError, match="no last_hidden_state to pool"):
        part(*pair(bert), collate(examples(bert, 2)), tmp_path, "embedding")
    with pytest.raises(DataError, match="embedding has shape"):
        part(student, encoder(hidden=32), collate(texts(2)), tmp_path, "embedding")


def test_attention_outlets_are_matched_and_their_hooks_removed(tmp_path):
    student, teacher = pair(bert)
    path = "bert.encoder.layer.1.attention.output.dense"
    batch = collate(examples(bert, 5))
    seen = []
    for model in (student, teacher):
        hook = model.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[2]))
        model(**batch)
        hook.remove()
    ours, theirs = (states[batch["attention_mask"] == 1] for states in seen)
    expected = ((ours - theirs).square().mean(-1) / theirs.square().mean(-1)).mean()
    loss = part(student, teacher, batch, tmp_path, "attention", outlets={path: path})
    torch.testing.assert_close(loss, expected)
    assert not student.get_submodule(path)._forward_hooks
    with pytest.raises(RecipeError, match=r"'nowhere', which the student"):
        part(student, teacher, batch, tmp_path, "attention", outlets={"nowhere": path})


# Training -------------------------------------------------------------------------------------


def reference_steps(student, teacher, rows, steps):
    """Distil by hand on whole batches: SGD on 0.5 task + 1.0 KL + 1.0 hidden."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student.train()
    losses = []
    for step in range(steps):
        batch = collate(rows[8 * step : 8 * step + 8])
        ours = student(**batch, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(**batch, output_hidden_states=True)
        logits, targets = (ours.logits, theirs.logits), batch["labels"]
        if logits[0].dim() == 3:
            if isinstance(student, LlamaForCausalLM):
                logits, targets = [each[:, :-1] for each in logits], targets[:, 1:]
            logits = [each[targets != -100] for each in logits]
        pairs = [(ours.get("hidden_states"), theirs.get("hidden_states"), None)]
        if isinstance(student, T5ForConditionalGeneration):
            pairs = [
                (ours.encoder_hidden_states, theirs.encoder_hidden_states, None),
                (ours.decoder_hidden_states, theirs.decoder_hidden_states, targets != -100),
            ]
        hidden = []
        for lefts, rights, mask in pairs:
            mask = (
                batch["attention_mask"].bool()
                if mask is None and "attention_mask" in batch
                else mask
            )
            for left, right in zip(lefts[1:], rights[1:], strict=True):
                error = (left - right).square().mean(-1) / right.square().mean(-1)
                hidden.append(error.mean() if mask is None else error[mask].mean())
        divergence = torch.stack([kl(p, q) for q, p in zip(*logits, strict=True)]).mean()
        parts = ours.loss, divergence, torch.stack(hidden).mean()
        loss = 0.5 * parts[0] + parts[1] + parts[2]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item(), *(value.item() for value in parts)])
    return losses


@pytest.mark.parametrize("make", [bert, llama, t5, vit])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_training_is_the_explicit_loop_whatever_the_accumulation(make, accumulation, tmp_path):
    rows = examples(make, 16)
    by_hand, teacher = pair(make)
    student, _ = pair(make)
    teacher_before = weights(teacher)
    expected = reference_steps(by_hand, teacher.eval(), rows, steps=2)
    trainer = trainer_of(
        student,
        teacher,
        tmp_path,
        rows,
        max_steps=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert_close(weights(student), weights(by_hand), rtol=1e-4, atol=1e-6)
    keys = ("loss", "loss_task", "loss_logits", "loss_hidden")
    logged = [[log[key] for key in keys] for log in trainer.state.log_history if "loss" in log]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert_close(weights(teacher), teacher_before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("family", ["bert", "vit", "distilbert", "gpt2", "llama", "t5", "bart"])
def test_without_dropout_training_computes_what_evaluation_does(family):
    config = tiny.config(family)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.5)
    config.layerdrop = config.encoder_layerdrop = config.decoder_layerdrop = 0.0
    torch.manual_seed(0)
    model = getattr(transformers, tiny.auto_class(family)).from_config(config)
    batch = tiny.batch(model)
    expected = model.eval()(**batch).logits
    model.train()
    for _ in range(2):  # as before afterwards
        assert not torch.allclose(model(**batch).logits, expected)
        with without_dropout(model):
            torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("family", ["wav2vec2", "whisper"])
def test_nor_are_spans_of_sound_masked(family):
    config = tiny.config(family)
    config.apply_spec_augment = True
    config.mask_time_prob, config.mask_time_length = 0.5, 2
    config.layerdrop = config.encoder_layerdrop = 0.0
    model = getattr(transformers, tiny.auto_class(family)).from_config(config)
    expected = model.eval()(**tiny.batch(model)).logits
    model.train()
    for _ in range(2):  # as before afterwards; Whisper masks its inputs in place
        with without_dropout(model):
            torch.testing.assert_close(model(**tiny.batch(model)).logits, expected)
        assert not torch.allclose(model(**tiny.batch(model)).logits, expected)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_student_drops_nothing_unless_asked_to(dropout, tmp_path):
    student, teacher = pair(dropping(bert))
    rows = examples(bert, 4)
    loss = student.eval()(**collate(rows)).loss.item()
    weights = {"task_weight": 1.0, "logits_weight": 0.0, "hidden_weight": 0.0}
    trainer = trainer_of(student, teacher, tmp_path, rows, max_steps=1, dropout=dropout, **weights)
    trainer.train()
    found = trainer.state.log_history[0]["loss_task"]
    assert (found == pytest.approx(loss, rel=1e-5)) != dropout


def test_parts_are_means_over_the_logging_interval(tmp_path):
    student, teacher = pair(bert)
    trainer = trainer_of(student, teacher, tmp_path, examples(bert), max_steps=4, logging_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        mixed = 0.5 * log["loss_task"] + log["loss_logits"] + log["loss_hidden"]
        assert log["loss"] == pytest.approx(mixed, rel=1e-5)


def speech(width, reduction="sum"):
    config = Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        ctc_loss_reduction=reduction,
    )
    return Wav2Vec2ForCTC(config)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_transcripts_count_by_example(reduction, tmp_path):
    """However many letters they have, and whether or not the model averages over them."""
    rows = [
        {"input_values": torch.randn(200), "labels": torch.tensor(label)}
        for label in ([1, 2, 3], [4, -100, -100], [5, 6, -100], [7, 8, -100])
    ]
    found = []
    for size in (4, 3, 1):
        student, teacher = pair(speech, reduction=reduction)
        changes = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": -(-4 // size),
        }
        weighed = {"task_weight": 1.0, "logits_weight": 0.0, "hidden_weight": 0.0}
        own = student.eval()(**collate(rows)).loss.item() / (4 if reduction == "sum" else 1)
        trainer = trainer_of(student, teacher, tmp_path, rows, max_steps=1, **changes, **weighed)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(own, rel=1e-4)
        found.append(weights(student))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert_close(found[2], found[0], rtol=1e-3, atol=1e-5)


def test_a_label_may_be_a_row_of_one(tmp_path):
    found = []
    for rows in (examples(bert, 4), [r | {"labels": [r["labels"]]} for r in examples(bert, 4)]):
        student, teacher = pair(bert)
        trainer_of(student, teacher, tmp_path, rows, max_steps=1).train()
        found.append(weights(student))
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_padding_on_the_left_teaches_what_padding_on_the_right_does(tmp_path):
    def on_the_left(rows):
        batch = collate(rows)
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        return {
            name: torch.stack([row.roll(shift) for row, shift in zip(values, shifts, strict=True)])
            for name, values in batch.items()
        }

    rows = [row | {"labels": row["input_ids"]} for row in examples(llama, 8)]
    found = []
    for pad, accumulation in ((collate, 1), (on_the_left, 1), (on_the_left, 4)):
        student, teacher = pair(llama)
        changes = {"gradient_accumulation_steps": accumulation, "max_steps": 1}
        args = arguments(tmp_path, per_device_train_batch_size=8 // accumulation, **changes)
        DistillationTrainer(student, teacher, args, train_dataset=rows, data_collator=pad).train()
        found.append(weights(student))
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert_close(found[2], found[0], rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_single_label_adds_nothing(tmp_path):
    """Prompt masking and truncation can leave one of the accumulated batches without targets."""
    rows = examples(llama, 8)
    for row in rows[:2]:
        row["labels"] = [-100] * len(row["labels"])
    by_hand, teacher = pair(llama)
    student, _ = pair(llama)
    reference_steps(by_hand, teacher.eval(), rows, steps=1)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer_of(student, teacher, tmp_path, rows, max_steps=1, **changes).train()
    assert_close(weights(student), weights(by_hand), rtol=1e-4, atol=1e-6)


def test_evaluation_reports_the_task_loss_without_the_teacher(tmp_path):
    student, teacher = pair(bert)
    rows = examples(bert, 4)
    trainer = trainer_of(student, teacher, tmp_path, rows)
    teacher.forward = None  # would raise if called
    loss = trainer.evaluate(rows)["eval_loss"]
    assert loss == pytest.approx(student(**collate(rows)).loss.item(), rel=1e-5)


def test_the_task_alone_asks_nothing_of_the_teacher(tmp_path):
    student, teacher = pair(bert)
    batch = collate(examples(bert, 4))
    loss = student(**batch).loss
    teacher.forward = None  # would raise if called
    torch.testing.assert_close(part(student, teacher, batch, tmp_path, "task"), loss)


def test_teacher_keeps_its_dtype(tmp_path):
    student, teacher = pair(vit)
    teacher.to(torch.bfloat16)
    trainer = trainer_of(student, teacher, tmp_path, examples(vit), max_steps=1)
    trainer.train()
    assert teacher.dtype == torch.bfloat16 and not teacher.training
    optimised = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert optimised == {id(value) for value in student.parameters()}


@pytest.mark.parametrize("make", [bert, encoder])
def test_the_teacher_may_be_a_folder(make, tmp_path):
    student, teacher = pair(make)
    teacher.to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    weighed = {"task_weight": 0.0, "logits_weight": float(make is bert), "hidden_weight": 0.0}
    weighed["embedding_weight"] = float(make is encoder)
    rows = examples(bert, 4) if make is bert else texts(4)
    trainer = trainer_of(student, tmp_path / "teacher", tmp_path, rows, **weighed)
    assert type(trainer.teacher) is type(teacher) and trainer.teacher.dtype == torch.bfloat16
    assert_close(weights(trainer.teacher), weights(teacher), rtol=0, atol=0)


def test_arguments_without_weights_and_a_wrapped_teacher_are_named(tmp_path):
    student, teacher = pair(bert)
    stock = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(RecipeError, match=r"args are TrainingArguments.*DistillationArguments"):
        distill(student, teacher, examples(bert), args=stock)
    with pytest.raises(RecipeError, match="teacher is a Sequential; give a transformers model"):
        trainer_of(student, torch.nn.Sequential(teacher), tmp_path)


def test_a_model_is_not_its_own_teacher(tmp_path):
    student, _ = pair(bert)
    with pytest.raises(RecipeError, match="one and the same model"):
        trainer_of(student, student, tmp_path)


def test_use_cache_is_restored_also_in_checkpoints(tmp_path):
    student, teacher = pair(llama)
    student.config.use_cache = True
    rows = examples(llama, 4)
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_of(student, teacher, tmp_path, rows, **changes).train()
    assert student.config.use_cache and teacher.config.use_cache
    assert json.loads((tmp_path / "checkpoint-1/config.json").read_text())["use_cache"] is True
    student, teacher = pair(vit)
    trainer_of(student, teacher, tmp_path / "vit", examples(vit, 4), **changes).train()
    assert "use_cache" not in (tmp_path / "vit/checkpoint-1/config.json").read_text()


def spoil(model):
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))


def stop(model):
    raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    student, teacher = pair(bert)
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    named = (
        r"global step 4, batch 1 of 1 on process 0 \(input_ids \(4, 7\), attention_mask \(4, 7\), "
        r"labels \(4,\)\): task nan, logits nan, hidden 0\.\d+"
    )
    with pytest.raises(DataError, match=named):
        distill(
            student,
            teacher,
            examples(bert, 32),
            args=args,
            data_collator=collate,
            callbacks=[At(3, spoil)],
        )
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert all(value.isfinite().all() for value in saved.state_dict().values())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_batch_that_is_not_finite_is_named(tmp_path):
    student, teacher = pair(vit)
    rows = examples(vit, 8)
    rows[6]["pixel_values"][0, 0, :2] = float("inf")
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    named = r"step 1, batch 4 of 4 on process 0 \(pixel_values \(2, 3, 8, 8\) with 2 not finite"
    with pytest.raises(DataError, match=named):
        trainer_of(student, teacher, tmp_path, rows, max_steps=1, **changes).train()


def test_spoilt_weights_are_not_saved(tmp_path):
    student, teacher = pair(bert)
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(student, teacher, tmp_path, examples(bert, 32), **changes)
    trainer.add_callback(At(4, spoil))
    with pytest.raises(DataError, match=r"classifier\.weight is not finite after global step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def dropping(make):
    return lambda width: make(width=width, hidden_dropout_prob=0.1)


@pytest.mark.parametrize("make", [vit, bert])
def test_a_stopped_run_resumes_to_the_same_weights(make, tmp_path):
    def run(folder, **extra):
        student, teacher = pair(dropping(make))
        args = arguments(
            tmp_path / folder,
            optim="adamw_torch",
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            train_sampling_strategy="random",
            max_steps=10,
            save_strategy="steps",
            save_steps=5,
            dropout=True,
        )
        return student, lambda: distill(
            student, teacher, examples(make, 32), args=args, data_collator=collate, **extra
        )

    straight, go = run("straight")
    go()
    _, go = run("stopped", callbacks=[At(7, stop)])
    with pytest.raises(KeyboardInterrupt):
        go()
    (tmp_path / "stopped/checkpoint-6").mkdir()  # killed while saving
    _, go = run("stopped")
    with pytest.raises(RecipeError, match=r"checkpoint-5 of an earlier run; pass resume=True"):
        go()
    resumed, go = run("stopped", resume=True)
    assert go().global_step == 10
    assert_close(weights(resumed), weights(straight), rtol=0, atol=0)
    finished, go = run("stopped", resume=True)
    assert go().global_step == 10
    assert_close(weights(finished), weights(straight), rtol=0, atol=0)


def test_checkpoints_have_the_names_in_memory_and_load_anywhere(tmp_path):
    student, teacher = pair(vit)
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(student, teacher, tmp_path, examples(vit, 4), **changes)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1/model.safetensors")
    assert_close(saved, weights(student), rtol=0, atol=0)
    again = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
    assert_close(weights(again), weights(student), rtol=0, atol=0)
    trainer.save_model(tmp_path / "published")  # the stock format, by the stock method
    stock = load_file(tmp_path / "published/model.safetensors")
    assert stock.keys() != saved.keys()
    again = ViTForImageClassification.from_pretrained(tmp_path / "published")
    assert_close(weights(again), weights(student), rtol=0, atol=0)


def test_a_checkpoint_with_other_names_is_refused(tmp_path):
    student, teacher = pair(vit)
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(student, teacher, tmp_path, examples(vit, 8), **changes).train()
    student.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the model's tensors"):
        trainer_of(student, teacher, tmp_path, examples(vit, 8), **changes).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_going_on_from_weights_alone_is_warned_of(tmp_path):
    def go(steps, **options):
        student, teacher = pair(bert)
        changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
        args = arguments(tmp_path, max_steps=steps, **changes)
        rows = examples(bert, 8)
        distill(student, teacher, rows, args=args, data_collator=collate, **options)

    go(2)
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no optimizer.pt \(save_only_model"):
        go(4, resume=True)


def test_tied_weights_resume(tmp_path):
    student, teacher = pair(t5)
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(student, teacher, tmp_path, examples(t5, 8), **changes).train()
    resumed, _ = pair(t5)
    trainer_of(resumed, teacher, tmp_path, examples(t5, 8), **changes).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert_close(weights(resumed), weights(student), rtol=0, atol=0)


def test_verification_is_left_out_of_checkpoints_only(tmp_path):
    calls = []

    class Verified(BertForSequenceClassification):
        def save_pretrained(self, save_directory, *, verify=True, **kwargs):
            calls.append(verify)
            super().save_pretrained(save_directory, **kwargs)

    student = bert(Verified, width=16)
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(student, bert(), tmp_path, examples(bert, 4), **changes)
    trainer.train()
    trainer.save_model(tmp_path / "published")
    assert calls == [False, True]


def judged(student, folder, judge, metric="accuracy", **extra):
    """What distils a student for 8 steps, saved and judged at every other step."""
    args = arguments(
        folder,
        max_steps=8,
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model=metric,
        train_sampling_strategy="random",
        dropout=True,
    )
    rows = examples(vit, 16)
    _, teacher = pair(vit)
    options = {"args": args, "data_collator": collate, "compute_metrics": judge, **extra}
    return lambda: distill(student, teacher, rows, rows[:4], **options)


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [((0.1, 0.2, 0.9, 0.3, 0.9), 4), ((0.5, 0.4, 0.5, 0.1, 0.3), 0)],
    ids=["a checkpoint", "the start"],
)
def test_the_best_by_the_held_out_metric_is_kept(accuracies, best, tmp_path, caplog):
    student, _ = pair(vit)
    start, values = weights(student), iter(accuracies)
    run = judged(student, tmp_path, lambda prediction: {"accuracy": next(values)})
    with caplog.at_level("INFO", "hfprune"):
        assert run().metrics["kept_step"] == best
    kept = load_file(tmp_path / f"checkpoint-{best}/model.safetensors")
    assert_close(weights(student), kept, rtol=0, atol=0)
    last = load_file(tmp_path / "checkpoint-8/model.safetensors")
    assert any(not torch.equal(last[name], kept[name]) for name in kept)
    if best:
        assert "Kept the weights of step 4: accuracy 0.9 on" in caplog.text
    else:
        assert_close(weights(student), start, rtol=0, atol=0)
        assert "Kept the model as it was before training (accuracy 0.5 on" in caplog.text


@pytest.mark.parametrize(
    ("metric", "killed_at"),
    [
        ("near", 5),
        ("far", 1),
        pytest.param("near", 1, marks=pytest.mark.slow),
        pytest.param("far", 5, marks=pytest.mark.slow),
    ],
)
def test_the_start_competes_also_in_a_run_that_goes_on(metric, killed_at, tmp_path):
    """By "near" the start is the best of all, by "far" a later checkpoint."""
    make = dropping(vit)
    student, _ = pair(make)
    start = weights(student)
    rows = collate(examples(vit, 4))
    first = student.eval()(**rows).logits.detach()

    def judge(prediction):
        moved = float((torch.as_tensor(prediction.predictions) - first).norm())
        return {"near": -moved, "far": moved}

    straight = judged(student, tmp_path / "straight", judge, metric)().metrics["kept_step"]
    stopped, _ = pair(make)
    with pytest.raises(KeyboardInterrupt):
        judged(stopped, tmp_path / "stopped", judge, metric, callbacks=[At(killed_at, stop)])()
    resumed, _ = pair(make)
    spoil(resumed)  # what it has comes from the checkpoint
    ended = judged(resumed, tmp_path / "stopped", judge, metric, resume=True)()
    assert ended.global_step == 8 and ended.metrics["kept_step"] == straight
    assert (straight == 0) == (metric == "near")
    assert_close(weights(resumed), weights(student), rtol=0, atol=0)
    same = all(torch.equal(start[name], value) for name, value in weights(resumed).items())
    assert same == (metric == "near")


def test_the_best_is_found_where_the_folder_has_moved(tmp_path):
    student, _ = pair(vit)
    start, accuracies = weights(student), iter([0.9, 0.1, 0.2, 0.3, 0.4])

    def judge(prediction):
        return {"accuracy": next(accuracies)}

    with pytest.raises(KeyboardInterrupt):
        judged(student, tmp_path / "before", judge, callbacks=[At(5, stop)])()
    (tmp_path / "before").rename(tmp_path / "after")
    ended = judged(student, tmp_path / "after", judge, resume=True)()
    assert ended.metrics["kept_step"] == 0
    assert_close(weights(student), start, rtol=0, atol=0)


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_weight": -1.0}, "at least 0"),
        ({"task_weight": 0.0, "logits_weight": 0.0, "hidden_weight": 0.0}, "one of them above 0"),
        ({"hidden_weight": float("nan")}, "'hidden': nan.*give finite numbers"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"skew": 1.0}, "skew is 1"),
        ({"divergence": "foward"}, "Did you mean 'forward'"),
        ({"embedding_distance": "cosin"}, "Did you mean 'cosine'"),
    ],
)
def test_bad_arguments_are_refused(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("student", "teacher", "changes", "message"),
    [
        (llama(), llama(vocabulary=50), {}, "40 vocabulary entries, the teacher 50"),
        (bert(), bert(num_labels=2), {}, "3 labels, the teacher 2 labels"),
        (
            bert(id2label={0: "a", 1: "b", 2: "c"}),
            bert(id2label={0: "b", 1: "a", 2: "c"}),
            {},
            "number the labels differently",
        ),
        (bert(), bert(), {"attention_weight": 1.0}, "attention_outlets is not"),
        (bert(), bert(), {"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_training(
    student, teacher, changes, message, tmp_path
):
    with pytest.raises(RecipeError, match=message):
        trainer_of(student, teacher, tmp_path, **changes)


@pytest.mark.parametrize("layer_map", [(0,), (0, 4), (-1, 3)])
def test_a_wrong_layer_map_is_refused(layer_map, tmp_path):
    with pytest.raises(RecipeError, match="give 2 teacher layers, each from 0 to 3"):
        part(
            bert(), bert(layers=4), collate(examples(bert, 2)), tmp_path, "hidden",
            layer_map=layer_map,
        )  # fmt: skip


def test_bad_data_is_refused(tmp_path):
    student, teacher = pair(llama)
    with pytest.raises(DataError, match="train_dataset is empty"):
        distill(student, teacher, [], args=arguments(tmp_path))
    batch = collate(examples(llama, 2))
    del batch["labels"]
    with pytest.raises(DataError, match="token-level labels"):
        part(student, teacher, batch, tmp_path, "logits")
    with pytest.raises(RecipeError, match="save_strategy is 'no'"):
        rows = examples(llama, 2)
        distill(student, teacher, rows, rows, args=arguments(tmp_path), compute_metrics=dict)


# Processes ------------------------------------------------------------------------------------


def two_process_main(folder):
    """What each of the processes of the test below runs."""
    student, teacher = pair(llama)
    trainer = trainer_of(
        student,
        teacher,
        folder,
        examples(llama, 16),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save((weights(student), trainer.state.log_history), f"{folder}/result.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    by_hand, teacher = pair(llama)
    expected = reference_steps(by_hand, teacher.eval(), examples(llama, 16), steps=2)
    succeed(together(Path(__file__), tmp_path))
    found, history = torch.load(tmp_path / "result.pt")
    assert_close(found, weights(by_hand), rtol=1e-4, atol=1e-6)
    keys = ("loss", "loss_task", "loss_logits", "loss_hidden")
    logged = [[log[key] for key in keys] for log in history if "loss" in log]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(expected), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    two_process_main(sys.argv[1])
    leave()
