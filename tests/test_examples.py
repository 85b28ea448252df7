"""From rows to examples: where answers and words end up, what images become; what is refused."""

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from test_data import WORDS, sentences, tiny_tokenizer
from transformers import ViTImageProcessorPil

from hfprune.data import (
    Batches,
    check_classes,
    check_other_classes,
    class_names,
    load_named,
    load_splits,
    untaught,
)
from hfprune.errors import DataError, RecipeError
from hfprune.examples import OUTSIDE, answered, pictures, rewritten, tagged
from hfprune.recipe import Data
from hfprune.tasks import TASKS

NAMES = ("train", "dev", "test")
FILES = dict.fromkeys(NAMES, "nowhere")


def splits(rows):
    return {split: Dataset.from_list(rows) for split in NAMES}


# Question answering: windows of 20 tokens with 6 shared, 3 of them special and 2 of the question.

SQUAD = Data(
    **FILES, text="question", text_pair="context", label="answers", max_length=20, stride=6
)


def asked(context, answer, begin=None):
    answers = {"text": [], "answer_start": []}
    if answer:
        begin = context.index(answer) if begin is None else begin
        answers = {"text": [answer], "answer_start": [begin]}
    return {"question": " good film", "context": context, "answers": answers}


def windows(rows):
    return list(answered(splits(rows), tiny_tokenizer(), SQUAD)["train"])


def test_every_window_says_where_its_answer_is():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(30):
        picks = torch.randint(len(WORDS), (40,), generator=generator).tolist()
        words = [WORDS[n] for n in picks]
        first = int(torch.randint(36, (1,), generator=generator))
        answer = " ".join(words[first : first + 4])
        begin = len(" ".join(words[:first])) + bool(first)
        rows.append(asked(" ".join(words), answer, begin))
    held = dict.fromkeys(range(30), 0)
    for window in windows(rows):
        row, places = rows[window["question"]], [tuple(p) for p in window["offsets"]]
        assert window["context"] == row["context"] and window["answers"] == row["answers"]["text"]
        inside = [n for n, place in enumerate(places) if place != OUTSIDE]
        assert len(inside) <= 15 and len(places) == len(window["input_ids"])
        begin = row["answers"]["answer_start"][0]
        end = begin + len(row["answers"]["text"][0])
        whole = places[inside[0]][0] <= begin and end <= places[inside[-1]][1]
        start, last = window["start_positions"], window["end_positions"]
        if whole:
            assert (places[start][0], places[last][1]) == (begin, end)
            held[window["question"]] += 1
        else:
            assert (start, last) == (0, 0)
    # Windows share 6 tokens, so that 4 of an answer are never torn apart.
    assert min(held.values()) >= 1 and max(held.values()) >= 2


def test_a_question_without_an_answer_points_at_the_first_token():
    (window,) = windows([asked("the film is dull", "")])
    assert (window["start_positions"], window["end_positions"], window["answers"]) == (0, 0, [])


def test_an_answer_inside_of_a_token_is_that_token():
    (window,) = windows([asked("the film is dull", "ul")])
    start, end = window["start_positions"], window["end_positions"]
    assert start == end
    begins, ends = window["offsets"][start]
    assert window["context"][begins:ends] == "dull"


def test_questions_that_cannot_serve():
    with pytest.raises(DataError, match=r"max_length 20 leaves 5 for its context.* share 6"):
        windows([asked("the film", "film") | {"question": "good " * 12}])
    for answers in (
        "film",
        {"text": "film", "answer_start": 4},
        {"text": ["film"], "answer_start": []},
        {"text": ["film"], "answer_start": ["4"]},
    ):
        with pytest.raises(DataError, match=r"answers' of example 0 is .*; it must be of the form"):
            windows([asked("the film", "film") | {"answers": answers}])


@pytest.mark.parametrize("begin", [0, 8, 13, 17, 400])
def test_an_answer_that_does_not_stand_where_it_says_is_told(begin, caplog):
    windows([asked("the film", "film"), asked("the bad film is now dull", "dull", begin)])
    said, *_ = caplog.messages  # of every split
    assert said.startswith("data.train: 1 of 2 answers do not stand where `answer_start` says")
    assert f"In example 1 'dull' is at {begin}, where 'context' has " in said


@pytest.mark.parametrize(("text", "begin"), [("film", 3), ("film", 5), (" film ", 4), ("", 60)])
def test_an_answer_that_is_slightly_off_serves(text, begin, caplog):
    row = asked("the film is dull", "film") | {"answers": {"text": [text], "answer_start": [begin]}}
    assert len(windows([row])) == 1
    assert not caplog.messages


def test_the_model_sees_its_inputs_only():
    rows = [asked("the film is dull", "dull"), asked("the very bad plot and the cast", "plot")]
    made = answered(splits(rows), tiny_tokenizer(), SQUAD)["train"]
    task = TASKS["question-answering"]
    (batch, of_batch), *_ = Batches(made, task.collator(tiny_tokenizer(), None), 2).with_rows()
    inputs = {"input_ids", "attention_mask", "start_positions", "end_positions"}
    assert batch.keys() == inputs
    assert [row["question"] for row in of_batch] == [0, 1]
    model = tiny.model("bert", "AutoModelForQuestionAnswering")
    assert model(**batch).loss.isfinite()


# Words with a class each.

TAGS = Data(**FILES, text="tokens", label="tags", max_length=6)


def characters():
    """A tokenizer that splits words into characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: n for n, letter in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    made = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def test_the_first_token_of_a_word_is_of_its_class():
    rows = [{"tokens": ["abc", "d", "ab"], "tags": [3, 0, 5]}, {"tokens": ["a"], "tags": [1]}]
    made = tagged(splits(rows), characters(), TAGS)["dev"]
    assert made["labels"][:] == [[3, -100, -100, 0, 5, -100], [1]]
    collate = TASKS["token-classification"].collator(characters(), None)
    (batch,) = Batches(made, collate, 2)
    assert batch["labels"].tolist()[0] == [1, -100, -100, -100, -100, -100]


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": ["a", "b"], "tags": [1]},
        {"tokens": ["a"], "tags": [-1]},
        {"tokens": "a", "tags": [1]},
        {"tokens": ["a"], "tags": 1},
        {"tokens": [1], "tags": [1]},
        {"tokens": [None], "tags": [1]},
    ],
)
def test_words_that_cannot_serve(row):
    with pytest.raises(DataError, match="'tokens' and 'tags' of example 0 must be lists of equal"):
        tagged(splits([row]), characters(), TAGS)


def test_a_model_of_another_task_is_named(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    with pytest.raises(
        RecipeError, match="is of a family that AutoModelForSeq2SeqLM does not load"
    ):
        TASKS["summarization"].load(str(tmp_path))


# Texts to write.


def test_a_text_follows_its_prefix_and_its_target_stands_alone():
    data = Data(
        **FILES, label="short", prefix="very ", max_length=5, max_target_length=4, text="long"
    )
    rows = [{"long": "good film and plot", "short": "good film"}, {"long": "dull", "short": "bad"}]
    words = tiny_tokenizer()
    made = rewritten(splits(rows), words, data)["train"]
    expected = words("very good film and plot", truncation=True, max_length=5)["input_ids"]
    assert made["input_ids"][0] == expected and len(expected) == 5
    assert made["labels"][0] == words("good film")["input_ids"]
    config = tiny.config("t5")
    (batch,) = Batches(made, TASKS["summarization"].collator(words, lambda: config), 2)
    short, long = batch["labels"]
    assert short.tolist()[-1] == -100 and -100 not in long.tolist()
    started = config.decoder_start_token_id
    assert batch["decoder_input_ids"][1].tolist() == [started, *long.tolist()[:-1]]
    assert batch["decoder_attention_mask"].equal((batch["labels"] != -100).long())
    model = tiny.model("t5")
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert model(**given).logits.equal(model(**batch).logits)


# Images.


def images(folder, **classes):
    """A folder per class of so many images each, class n of brightness 50 * n."""
    for number, (name, count) in enumerate(classes.items(), 1):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            color = (50 * number, index, 0)
            Image.new("RGB", (6, 4), color).save(folder / name / f"{index}.png")


def processor():
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def test_a_folder_of_images_per_class(tmp_path):
    for split in NAMES:
        images(tmp_path / split, cat=2, test=3)
    data = Data(**{split: str(tmp_path / split) for split in NAMES})
    loaded = load_splits(data)
    assert class_names(loaded, data.label) == ["cat", "test"]
    made = pictures(loaded, processor(), data)["test"].shuffle(seed=1)
    collate = TASKS["image-classification"].collator(processor(), None)
    batch = Batches(made, collate, 5)[0]
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    red = batch["pixel_values"][:, 0].mean((1, 2))  # of pixels scaled to -1 ... 1
    torch.testing.assert_close(red, 100 * (batch["labels"] + 1) / 255 - 1)
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 1]


def test_images_by_their_paths_and_grey_ones(tmp_path):
    Image.new("L", (5, 5), 255).save(tmp_path / "white.png")
    rows = [{"picture": str(tmp_path / "white.png"), "kind": 1, "note": "of no use"}]
    data = Data(**FILES, image="picture", label="kind")
    (row,) = pictures(splits(rows), processor(), data)["train"]
    assert row.keys() == {"pixel_values", "labels"}
    assert row["pixel_values"].equal(torch.ones(3, 16, 16)) and row["labels"] == 1


def test_splits_of_other_classes_are_refused(tmp_path):
    for split, others in zip(NAMES, ("dog", "dog", "eel"), strict=True):
        images(tmp_path / split, cat=1, **{others: 1})
    data = Data(**{split: str(tmp_path / split) for split in NAMES})
    with pytest.raises(DataError, match=r"data\.test has the classes \['cat', 'eel'\], and"):
        class_names(load_splits(data), "label")


def test_other_images_of_other_classes_are_refused(tmp_path):
    images(tmp_path / "own", cat=1, dog=1)
    images(tmp_path / "other", dog=1)
    data = Data(**dict.fromkeys(NAMES, str(tmp_path / "own")))
    own, other = load_splits(data)["test"], load_named(data, {"other": str(tmp_path / "other")})
    check_other_classes("measure.also.own", own, own, "label", 2)
    with pytest.raises(DataError, match=r"^measure\.also\.other has the classes \['dog'\], and"):
        check_other_classes("measure.also.other", other["other"], own, "label", 2)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.train \(.*empty\) has no examples that can"):
        load_splits(Data(**dict.fromkeys(NAMES, str(tmp_path / "empty"))))


# Classes, and datasets on disk.


def test_a_saved_dataset_comes_back_with_the_names_of_its_classes(tmp_path):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_list(sentences(6), features=kinds).save_to_disk(tmp_path / "saved")
    loaded = load_splits(Data(**dict.fromkeys(NAMES, str(tmp_path / "saved"))))
    assert len(loaded["dev"]) == 6
    assert class_names(loaded, "label") == ["bad", "good"]


def test_labels_that_a_model_would_take_for_other_classes():
    check_classes(["bad", "good"], ["BAD", "Good"])
    check_classes(["LABEL_0"], ["LABEL_0", "LABEL_1"])
    check_classes(["yes", "no"], ["LABEL_0", "LABEL_1"])  # nothing is known of them
    check_classes([], [])
    with pytest.raises(DataError, match="labels are of 3 classes, and the model knows 2: let it"):
        check_classes(["a", "b", "c"], ["a", "b"])
    with pytest.raises(DataError, match="numbered good, bad, and the model's classes bad, good:"):
        check_classes(["good", "bad"], ["bad", "good"])


def test_classes_by_number_and_of_words():
    numbers = splits([{"label": 0}, {"label": 2}])
    assert class_names(numbers, "label") == ["LABEL_0", "LABEL_1", "LABEL_2"]
    lists = splits([{"tags": [0, 3]}, {"tags": [1]}])
    assert class_names(lists, "tags") == [f"LABEL_{n}" for n in range(4)]
    assert untaught(lists, "tags") == untaught(numbers, "label") == {}
    assert untaught(lists | {"train": lists["dev"].select([1])}, "tags") == {
        "dev": [0, 3],
        "test": [0, 3],
    }
    named = Features({"tags": List(ClassLabel(names=["O", "B-PER"]))})
    assert class_names({"train": Dataset.from_list([{"tags": [1]}], features=named)}, "tags") == [
        "O",
        "B-PER",
    ]
