"""One command publishes every size of a run. That every one comes back is proved by the page on
publishing, which the tests of docs/ execute.
"""

import json

import pytest
import saved
from huggingface_hub import ModelCard
from test_hub import TOUCHED, files

from hfprune.errors import PublishError
from hfprune.publishing.family import publish_family
from hfprune.publishing.parcel import RECORD
from hfprune.publishing.report import Report

SIZES = {"macs-80": "round-1/distilled", "macs-40": "round-2/distilled"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved.family(tmp_path_factory.mktemp("family"), base=None)


@pytest.fixture
def run(made):
    """A run that was not published yet."""
    (made / RECORD).unlink(missing_ok=True)
    return made


def quietly(run, repo="me/minilm", kind="revisions", **options):
    options = {"verify": False, "license": "mit", "say": lambda line: None} | options
    return publish_family(run, repo, kind, **options)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_family_is_a_branch_each_and_the_smallest_is_the_main_one(hub, run, tmp_path):
    done = quietly(run)
    assert {size: p.revision for size, p in done.items()} == {s: s for s in (*SIZES, "main")}
    refs = hub.repos["me/minilm"].refs
    assert {f"refs/heads/{size}": p.commit for size, p in done.items()} == refs
    for size, name in {**SIZES, "main": SIZES["macs-40"]}.items():
        found = files(hub, "me/minilm", size)
        assert found["model.safetensors"] == weights(run / name)
        assert found["plan.json"] == (run / name).with_name("plan.json").read_bytes()
        report = Report.from_dict(json.loads(found["report.json"]))
        assert report.result.name == name  # of this size, and of no smaller one
        assert report.to_dict()["seconds"].keys() == {"dense", *(v.name for v in report.variants)}
        card = ModelCard(found["README.md"].decode())
        (result,) = card.data.eval_results
        assert result.metric_value == report.result.quality.value
        for other in SIZES:
            assert f"| `{other}` |" in card.text
        assert ('revision="' in card.text) == (size != "main")
    budget = {size: files(hub, "me/minilm", size)["plan.json"] for size in SIZES}
    assert b"80%" in budget["macs-80"] and b"40%" in budget["macs-40"]
    larger = files(hub, "me/minilm", "macs-80")
    assert b"round-2" not in larger["report.md"] + larger["report.html"]
    assert {"figures/quality.png", "figures/kept-heads.svg"} <= larger.keys()
    assert b"somebody" not in b"".join(larger.values())
    again = quietly(run)
    assert {s: p.commit for s, p in again.items()} == {s: p.commit for s, p in done.items()}


def test_a_family_is_a_collection_of_repositories(hub, run):
    said = []
    done = quietly(run, kind="collection", private=True, say=said.append)
    repos = [f"me/minilm-{size}" for size in SIZES]
    assert list(hub.repos) == repos == [published.repo_id for published in done.values()]
    ((slug, collection),) = hub.collections.items()
    assert collection.models == repos and collection.private
    assert any(line.endswith(f"/collections/{slug}") for line in said)
    for size, name in SIZES.items():
        found = files(hub, f"me/minilm-{size}")
        assert found["model.safetensors"] == weights(run / name)
        assert (
            f"[me/minilm-{size}](https://huggingface.co/me/minilm-{size})".encode()
            in (found["README.md"])
        )


def test_a_dry_run_writes_a_folder_for_each_size(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    done = quietly(run, dry_run=tmp_path / "dry")
    assert {path.name for path in (tmp_path / "dry").iterdir()} == {*SIZES, "main"} == done.keys()
    for size, name in SIZES.items():
        assert weights(tmp_path / "dry" / size) == weights(run / name)
    with pytest.raises(PublishError, match="'bad name!' names no repository"):
        quietly(run, "bad name!", dry_run=tmp_path / "other")
    assert not hub.log


def test_nothing_is_sent_if_one_of_the_sizes_may_not_be(hub, run):
    repo = hub.create("me/minilm")
    repo.refs["refs/heads/macs-40"] = repo.refs["refs/heads/main"]
    hub.put("me/minilm", {"config.json": b"{}"}, "macs-40")
    with pytest.raises(PublishError, match=r"me/minilm \(macs-40\) has commits from elsewhere"):
        quietly(run)
    assert not [request for request in hub.log if TOUCHED.match(request)]


@pytest.mark.parametrize(
    ("kind", "change"),
    [("revisions", "/commit/"), pytest.param("collection", "/collections", marks=pytest.mark.slow)],
)
def test_a_family_goes_on_after_a_network_that_died(hub, run, kind, change):
    """It dies with the second change of a kind: when one size has arrived, or all have and the
    collection is there and empty.
    """
    hub.fail("close", lambda i, _: sum(change in request for request in hub.log[: i + 1]) > 1)
    with pytest.raises(PublishError, match="run it again"):
        quietly(run, kind=kind)
    first = [len(repo.commits) for repo in hub.repos.values()]
    hub.heal()
    for size, done in quietly(run, kind=kind).items():
        name = SIZES.get(size, SIZES["macs-40"])
        assert files(hub, done.repo_id, done.revision)["model.safetensors"] == weights(run / name)
    assert first == ([2] if kind == "revisions" else [2, 2])
    assert (
        [len(repo.commits) for repo in hub.repos.values()] == [4] if kind == "revisions" else first
    )
    assert [len(c.models) for c in hub.collections.values()] == (
        [2] if kind == "collection" else []
    )


def test_a_run_of_one_size_is_no_family(hub, tmp_path):
    with pytest.raises(PublishError, match=r"one size, macs=50%.*without --family"):
        quietly(saved.run(tmp_path / "run"))
    with pytest.raises(PublishError, match=r"collections'\. Did you mean 'collection'"):
        quietly(tmp_path, kind="collections")
    with pytest.raises(PublishError, match="not the folder of a run"):
        quietly(saved.save(tmp_path / "model"))
    assert not hub.log
