"""Answers and entities against numbers worked out by hand, and the search against brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from hfprune.errors import DataError
from hfprune.evaluation.evaluate import Quality, evaluate_perplexity, paired_difference
from hfprune.evaluation.extraction import (
    LONGEST,
    entities,
    evaluate_answers,
    evaluate_entities,
    word_f1,
)


@pytest.mark.parametrize(
    ("given", "right", "f1"),
    [
        ("The Cat!", "cat", 1.0),
        ("a black cat", "black cat sat", 0.8),  # 2 of 2 words are right, of 3
        ("cat cat", "cat", 2 / 3),  # one of them counts
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("the", "an", 1.0),  # articles are no words
    ],
)
def test_the_f1_of_words(given, right, f1):
    assert word_f1(given, right) == pytest.approx(f1)


class Reader(torch.nn.Module):
    """Gives the logits that its inputs are."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, starts, ends):
        return {"start_logits": self.scale * starts, "end_logits": self.scale * ends}


CONTEXT = "one two three four five"
PLACES = [(-1, -1), (0, 3), (4, 7), (8, 13), (14, 18), (19, 23), (-1, -1)]


def window(number, answers, places=PLACES, context=CONTEXT):
    return {"question": number, "context": context, "answers": answers, "offsets": places}


def logits(start, end, none=-9.0):
    """Logits that say: from this token to that one."""
    made = {name: torch.zeros(len(PLACES)) for name in ("starts", "ends")}
    for name, place in (("starts", start), ("ends", end)):
        made[name][place] = 5.0
        made[name][0] = none
    return made


def read(*said):
    """The quality of some windows, each with its logits."""
    batches = [({k: v[None] for k, v in given.items()}, [row]) for row, given in said]
    return evaluate_answers(Reader(), batches, progress=False)


def test_answers_score_by_their_words_and_as_a_whole():
    quality = read(
        (window(0, ["two three", "three"]), logits(2, 3)),  # matches the first answer
        (window(1, ["four five"]), logits(3, 5)),  # "three four five": f1 0.8
        (window(2, ["one"]), logits(4, 4)),
    )
    assert quality.metric == "answer_f1" and quality.examples == 3
    assert quality.value == pytest.approx((1 + 0.8 + 0) / 3)
    assert quality.beside == {"exact_match": pytest.approx(1 / 3)}
    assert quality.low <= quality.value <= quality.high
    assert Quality.from_dict(quality.to_dict()) == quality


def test_an_end_before_the_start_or_outside_is_no_answer():
    backwards = logits(4, 2)
    backwards["ends"][5] = 4.0
    outside = logits(6, 6)
    outside["starts"][2], outside["ends"][2] = 1.0, 1.0
    quality = read((window(0, ["four five"]), backwards), (window(1, ["two"]), outside))
    assert quality.value == 1


def test_the_surest_window_answers():
    unsure, sure = logits(1, 1), logits(3, 3)
    sure["starts"] *= 2
    assert read((window(0, ["three"]), unsure), (window(0, ["three"]), sure)).value == 1
    assert read((window(0, ["three"]), sure), (window(0, ["three"]), unsure)).examples == 1


def test_no_answer_competes_where_some_question_has_none():
    none, some = logits(1, 1, none=6.0), logits(2, 2)
    assert read((window(0, []), none), (window(1, ["two"]), some)).value == 1
    # Where all questions have answers, it does not.
    assert read((window(0, ["one"]), none), (window(1, ["two"]), some)).value == 1
    # One window that is not sure of it is enough for an answer.
    assert read((window(0, []), none), (window(0, []), logits(1, 1))).value == 0


def test_the_best_span_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(3)
    tokens = 60
    context = "".join(f"w{n:02} " for n in range(tokens))
    places = [(4 * n, 4 * n + 3) if 4 <= n < 57 else (-1, -1) for n in range(tokens)]
    for _ in range(10):
        start, end = torch.randn(2, tokens, generator=generator)
        pairs = [
            (float(start[i] + end[j]), i, j)
            for i in range(4, 57)
            for j in range(i, min(57, i + LONGEST))
        ]
        _, i, j = max(pairs)
        answer = context[places[i][0] : places[j][1]]
        given = {"starts": start, "ends": end}
        assert read((window(0, [answer], places, context), given)).beside["exact_match"] == 1


def test_answers_of_two_models_are_compared_on_the_same_questions():
    right, wrong = (window(0, ["two"]), logits(2, 2)), (window(0, ["two"]), logits(3, 3))
    assert paired_difference(read(wrong), read(right)).value == 1
    with pytest.raises(DataError, match="saw different examples"):
        paired_difference(read(right), read((window(0, ["three"]), logits(2, 2))))


def test_answers_that_cannot_be_judged():
    with pytest.raises(DataError, match="No questions"):
        read()
    broken = logits(1, 1)
    broken["ends"][2] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        read((window(0, ["two"]), broken))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("O B-PER I-PER O B-LOC", {(1, 3, "PER"), (4, 5, "LOC")}),
        ("B-PER B-PER I-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}),
        ("I-PER I-PER O I-PER", {(0, 2, "PER"), (3, 4, "PER")}),
        ("LABEL_0 LABEL_2 LABEL_2 LABEL_1", {(1, 3, "LABEL_2"), (3, 4, "LABEL_1")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_the_entities_of_a_text(names, found):
    assert entities(names.split()) == found


class Tagger(torch.nn.Module):
    """Predicts the classes that its input says."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.config = SimpleNamespace(id2label={0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"})

    def forward(self, said):
        one_hot = torch.nn.functional.one_hot(said, 4).float()
        return SimpleNamespace(logits=self.scale * one_hot)


def test_entities_are_right_by_their_words_and_type():
    labels = torch.tensor([[1, 2, -100, 0, 3], [0, 1, -100, -100, -100]])
    said = torch.tensor([[1, 2, 0, 0, 1], [3, 1, 3, 3, 3]])
    # Found: PER(0-2) right, PER(3) of the wrong type; LOC that is none, PER(1) right.
    quality = evaluate_entities(Tagger(), [{"said": said, "labels": labels}], progress=False)
    assert quality.value == pytest.approx(2 * 2 / (4 + 3))
    assert (quality.metric, quality.examples) == ("entity_f1", 2)
    none = {"said": said[:1], "labels": torch.zeros_like(labels[:1])}
    with pytest.raises(DataError, match="No entities"):
        evaluate_entities(Tagger(), [none], progress=False)


def test_entities_by_logits_that_are_not_numbers_are_refused():
    model = Tagger()
    model.scale.data.fill_(float("nan"))
    batch = {"said": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])}
    with pytest.raises(DataError, match="NaN"):
        evaluate_entities(model, [batch], progress=False)


def test_the_perplexity_of_what_an_encoder_decoder_is_to_write():
    model = tiny.model("t5")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 6), generator=generator)
    labels = ids.flip(1).clone()
    labels[1, 3:] = labels[3, 5:] = -100
    batch = {
        "input_ids": ids,
        "labels": labels,
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
    }
    with torch.no_grad():
        loss = float(model(**batch).loss)
    quality = evaluate_perplexity(model, [batch], progress=False)
    assert quality.value == pytest.approx(np.exp(loss), rel=1e-5)
    assert quality.per_example["tokens"].tolist() == [6, 3, 6, 5]
