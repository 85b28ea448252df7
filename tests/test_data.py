"""From files to batches: every example once, by length, always the same; and what is refused."""

import dataclasses
import json
import re

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hfprune.data import Batches, commit_of, load_splits, seen_among
from hfprune.errors import DataError
from hfprune.examples import blocks, labelled
from hfprune.recipe import Data
from hfprune.tasks import TASKS

WORDS = ["good", "bad", "great", "awful", "fine", "dull", "film", "plot", "cast", "ending"]
WORDS += ["a", "the", "very", "not", "and", "is", "was"]


def tiny_tokenizer():
    """A word-level tokenizer with the special tokens of both BERT and LLaMA."""
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        pair="[BOS] $A [EOS] $B [EOS]",
        special_tokens=[("[BOS]", 1), ("[EOS]", 2)],
    )
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def padding(tokenizer):
    """What makes batches of sentences."""
    return TASKS["text-classification"].collator(tokenizer, None)


def sentences(count, seed=0):
    """Rated sentences of 2 to 9 words: those with more good words than bad are of class 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(1, 9, (1,), generator=generator))
        rest = torch.randint(6, len(WORDS), (length,), generator=generator).tolist()
        told = [("good", "great", "fine"), ("bad", "awful", "dull")][number % 2][number % 3]
        rows.append({"text": " ".join([*(WORDS[i] for i in rest), told]), "label": 1 - number % 2})
    return rows


def write(folder, **splits):
    """One JSON-lines file per split; the `Data` that reads them."""
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(**{split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")})


@pytest.fixture
def data(tmp_path):
    return write(tmp_path, train=sentences(24), dev=sentences(8, 1), test=sentences(10, 2))


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def examples(batches):
    """The set of (real token ids, label) in some batches."""
    found = []
    for batch in batches:
        for ids, mask, label in zip(*(batch[n] for n in KEYS), strict=True):
            found.append((tuple(ids[mask.bool()].tolist()), int(label)))
    return found


KEYS = ("input_ids", "attention_mask", "labels")


def test_texts_that_also_teach_are_counted():
    taught = Dataset.from_dict({"a": ["one", "two", " "], "b": ["x", "y", ""]})
    rows = Dataset.from_dict({"a": ["two", "one", "two", " "], "b": ["y", "y", "y", ""]})
    assert seen_among(rows, taught, ["a"]) == 3
    assert seen_among(rows, taught, ["a", "b"]) == 2
    words = Dataset.from_dict({"a": [["one", "two"], ["one two"]]})
    assert seen_among(words.select([0]), words, ["a"]) == 1
    assert seen_among(words.select([0]), words.select([1]), ["a"]) == 0


def test_every_example_comes_once_with_others_of_its_length(data, tokenizer):
    train = labelled(load_splits(data), tokenizer, data)["train"]
    batches = Batches(train, padding(tokenizer), batch_size=5)
    assert len(batches) == 5
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 5, 5, 4]
    wanted = [(tuple(tokenizer(row["text"])["input_ids"]), row["label"]) for row in sentences(24)]
    assert sorted(examples(batches)) == sorted(wanted)
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in batches]
    flat = [n for batch in lengths for n in batch]
    assert flat == sorted(flat)
    assert len(set(flat)) > 3
    for batch, here in zip(batches, lengths, strict=True):  # padded to their longest, no further
        assert batch["input_ids"].shape[1] == max(here)


def test_batches_are_the_same_every_time(data, tokenizer):
    train = labelled(load_splits(data), tokenizer, data)["train"]
    batches = Batches(train, padding(tokenizer), batch_size=7)
    again = Batches(train, padding(tokenizer), batch_size=7)
    for one, two, three in zip(batches, batches, again, strict=True):
        assert all(one[n].equal(two[n]) and one[n].equal(three[n]) for n in KEYS)
    assert batches[0]["input_ids"].equal(next(iter(batches))["input_ids"])
    assert batches[-1]["input_ids"].equal(list(batches)[-1]["input_ids"])
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_a_limit_takes_the_first_examples(data, tokenizer):
    train = labelled(load_splits(data), tokenizer, data)["train"]
    some = examples(Batches(train, padding(tokenizer), batch_size=4, limit=6))
    first = [(tuple(tokenizer(r["text"])["input_ids"]), r["label"]) for r in sentences(24)[:6]]
    assert sorted(some) == sorted(first)
    assert len(examples(Batches(train, padding(tokenizer), batch_size=4, limit=1000))) == 24


def test_long_texts_are_cut_and_pairs_are_joined(tmp_path, tokenizer):
    rows = [{"one": "good film " * 10, "two": "bad plot", "class": 1}]
    files = write(tmp_path, train=rows, dev=rows, test=rows)
    columns = {"text": "one", "text_pair": "two", "label": "class", "max_length": 12}
    data = Data(files.train, files.dev, files.test, **columns)
    (example,) = labelled(load_splits(data), tokenizer, data)["train"]
    expected = tokenizer(rows[0]["one"], rows[0]["two"], truncation=True, max_length=12)
    assert example["input_ids"] == expected["input_ids"]
    assert len(example["input_ids"]) == 12
    assert example["labels"] == 1
    assert set(example) == set(KEYS)


def test_blocks_hold_every_token_in_order(data, tokenizer):
    data = Data(data.train, data.dev, data.test, max_length=8)
    made = blocks(load_splits(data), tokenizer, data)
    stream = [
        token
        for row in sentences(24)
        for token in tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    ]
    rows = made["train"]["input_ids"]
    assert len(rows) == len(stream) // 7
    assert {len(row) for row in rows} == {8}
    assert {row[0] for row in rows} == {tokenizer.bos_token_id}
    assert [token for row in rows for token in row[1:]] == stream[: 7 * len(rows)]
    assert made["train"]["labels"] == rows
    (batch, *_) = Batches(made["train"], padding(tokenizer), 3)
    assert batch["labels"].shape == batch["input_ids"].shape == (3, 8)
    assert batch["attention_mask"].all()


def test_blocks_without_a_first_token(data):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    data = Data(data.train, data.dev, data.test, max_length=8)
    rows = blocks(load_splits(data), tokenizer, data)["dev"]["input_ids"]
    assert {len(row) for row in rows} == {8}
    assert 1 not in {row[0] for row in rows}


def test_too_few_tokens_for_a_block(data, tokenizer):
    data = Data(data.train, data.dev, data.test, max_length=80)
    with pytest.raises(DataError, match=r"data\.dev has fewer than 79 tokens"):
        blocks(load_splits(data), tokenizer, data)


@pytest.mark.parametrize("make", [labelled, blocks])
def test_a_missing_text_column_names_the_nearest(make, data, tokenizer):
    data = Data(data.train, data.dev, data.test, text="txt")
    with pytest.raises(DataError, match=r"data\.train: Unknown column 'txt'\. Did you mean 'text'"):
        make(load_splits(data), tokenizer, data)


def test_missing_labels(tmp_path, tokenizer):
    bare = [{"text": row["text"]} for row in sentences(4)]
    data = write(tmp_path, train=sentences(4), dev=sentences(4), test=bare)
    message = r"data\.test: Unknown column 'label'\. Available: text\. Name it in `data\.label`"
    with pytest.raises(DataError, match=message):
        labelled(load_splits(data), tokenizer, data)
    assert blocks(load_splits(data), tokenizer, Data(data.train, data.dev, data.test, max_length=4))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dev.jsonl", ""),
        ("dev.jsonl", "\n\n"),
        ("dev.json", "[]"),
        ("dev.csv", ""),
        ("dev.csv", "text,label\n"),
        ("dev.jsonl", "{nope\n"),
        ("dev.csv", 'text\n"never closed\n'),
        ("dev.parquet", "this is not parquet"),
    ],
)
def test_a_split_without_examples(name, text, tmp_path):
    files = write(tmp_path, train=sentences(4), dev=[], test=sentences(4))
    (tmp_path / name).write_text(text)
    message = rf"^data\.dev \(.*{name}\) has no examples that can be read as \w+: .+$"
    with pytest.raises(DataError, match=message) as caught:
        load_splits(Data(files.train, str(tmp_path / name), files.test))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [None, "good", -1, 0.5, True])
def test_a_label_that_is_no_class(wrong, tmp_path, tokenizer):
    rows = [{"text": "fine", "label": wrong}] * 3
    data = write(tmp_path, train=sentences(4), dev=rows, test=sentences(4))
    with pytest.raises(
        DataError, match=f"data.dev: the 'label' of example 0 is {wrong!r}; it must"
    ):
        labelled(load_splits(data), tokenizer, data)


@pytest.mark.parametrize("make", [labelled, blocks])
@pytest.mark.parametrize("wrong", [None, 3])
def test_a_text_that_is_none(wrong, make, tmp_path, tokenizer):
    rows = [{"text": wrong, "label": 1}] * 3
    data = write(tmp_path, train=sentences(4), dev=rows, test=sentences(4))
    with pytest.raises(DataError, match=f"^data.dev: the 'text' of example 0 is {wrong}; it must"):
        make(load_splits(data), tokenizer, data)


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
def test_other_kinds_of_file(ending, tmp_path, data):
    from datasets import Dataset

    path = tmp_path / f"train.{ending}"
    getattr(Dataset.from_list(sentences(4)), f"to_{ending}")(path)
    assert load_splits(Data(str(path), data.dev, data.test))["train"].to_list() == sentences(4)


def test_words_of_a_csv_are_texts_and_an_empty_cell_is_none(tmp_path, tokenizer):
    words = ["null", "NA", "None", "nan", "n/a"]
    path = tmp_path / "all.csv"
    path.write_text("text,label\n" + "".join(f"{word},1\n" for word in words))
    data = Data(*[str(path)] * 3)
    assert load_splits(data)["train"]["text"][:] == words
    path.write_text("text,label\nnull,1\n,0\n")
    with pytest.raises(DataError, match=r"data\.train: the 'text' of example 1 is None"):
        labelled(load_splits(data), tokenizer, data)


def test_a_path_is_no_pattern(tmp_path):
    folder = tmp_path / "films [v2] a*b"
    folder.mkdir()
    data = write(folder, train=sentences(4), dev=sentences(2), test=sentences(3))
    assert [len(split) for split in load_splits(data).values()] == [4, 2, 3]


@pytest.mark.parametrize("name", ["tset", "test[:50"])
def test_a_split_that_a_dataset_does_not_have(name, tmp_path):
    write(tmp_path, train=sentences(4), test=sentences(2))
    data = Data("train", "test", name, dataset=str(tmp_path))
    with pytest.raises(DataError, match=rf"^data\.test \({re.escape(name)}\) cannot be read of"):
        load_splits(data)


def test_files_have_no_commit(data):
    """Hub datasets have: see tests/publishing/test_hub.py, where there is a Hub."""
    assert commit_of(load_splits(data)["train"]) is None


def test_an_unknown_kind_of_file(tmp_path, data):
    with pytest.raises(DataError, match=r"Unknown kind of data file 'jsnl'\. Did you mean 'jso"):
        load_splits(Data(str(tmp_path / "train.jsnl"), data.dev, data.test))


def test_a_folder_of_several_splits_names_them(tmp_path):
    rows = Dataset.from_list(sentences(2))
    DatasetDict(small=rows, large=rows).save_to_disk(tmp_path / "all")
    data = Data(str(tmp_path / "all"), "dev", "test")
    message = r"^data\.train .*several splits \(small, large\): give the folder of one, .*all/small"
    with pytest.raises(DataError, match=message):
        load_splits(data)


def test_a_file_of_nothing_but_a_header_is_empty(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"can be read as csv: it is empty$"):
        load_splits(Data(str(tmp_path / "train.csv"), "dev", "test"))


def test_blocks_have_room_for_text(tmp_path):
    data = dataclasses.replace(write(tmp_path, train=sentences(4)), max_length=1)
    with pytest.raises(DataError, match="max_length 1 has no room for text"):
        blocks({"train": Dataset.from_list(sentences(4))}, tiny_tokenizer(), data)
