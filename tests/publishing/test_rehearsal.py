"""The Hub on loopback, driven by the real client: it must answer as the Hub does, or the tests of
publishing prove nothing.
"""

import hashlib
import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hfprune.publishing.rehearsal_store import Upload, User

WEIGHTS = bytes(range(256)) * 400


def add(path, content):
    return CommitOperationAdd(path, content)


def commit(api, *operations, **options):
    options = {"commit_message": "a change"} | options
    return api.create_commit("me/model", operations, **options)


@pytest.fixture
def api(hub):
    made = HfApi()
    made.create_repo("me/model")
    return made


def test_what_goes_up_comes_down(hub, api, tmp_path):
    made = commit(api, add("config.json", b"{}"), add("model.safetensors", WEIGHTS))
    folder = snapshot_download("me/model", cache_dir=tmp_path / "empty")
    assert (tmp_path / "empty").is_dir()
    with open(f"{folder}/model.safetensors", "rb") as file:
        assert file.read() == WEIGHTS
    info = api.model_info("me/model")
    assert info.sha == made.oid == folder.rsplit("/", 1)[1]
    assert {s.rfilename for s in info.siblings} == {
        ".gitattributes",
        "config.json",
        "model.safetensors",
    }
    tree = {entry.path: entry for entry in api.list_repo_tree("me/model")}
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert tree["config.json"].lfs is None
    (found,) = api.get_paths_info("me/model", ["config.json", "nothing"])
    assert found.blob_id == tree["config.json"].blob_id
    assert [r for r in hub.log if r.startswith("PUT /storage/")]


def test_commits_never_change_and_branches_move(api, tmp_path):
    first = commit(api, add("a.txt", b"1")).oid
    api.create_tag("me/model", tag="v1")
    api.create_branch("me/model", branch="small/one")
    second = commit(api, add("a.txt", b"2"), revision="small/one").oid
    third = commit(api, CommitOperationDelete("a.txt"), add("b.txt", b"3")).oid
    refs = api.list_repo_refs("me/model")
    assert {r.name: r.target_commit for r in refs.branches} == {"main": third, "small/one": second}
    assert [(r.name, r.target_commit) for r in refs.tags] == [("v1", first)]

    def read(revision):
        path = hf_hub_download("me/model", "a.txt", revision=revision, cache_dir=tmp_path / "c")
        with open(path) as file:
            return file.read()

    assert [read(r) for r in ("v1", first, "small/one")] == ["1", "1", "2"]
    with pytest.raises(EntryNotFoundError):
        read("main")
    with pytest.raises(RevisionNotFoundError):
        read("no-such-branch")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("me/model", branch="small/one")


def test_a_commit_on_an_old_parent_is_refused(api):
    old = api.model_info("me/model").sha
    made = commit(api, add("a.txt", b"1"), parent_commit=old).oid
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, add("a.txt", b"2"), parent_commit=old)
    assert api.model_info("me/model").sha == made


def test_a_proposal_leaves_the_branch(api):
    before = api.model_info("me/model").sha
    made = commit(api, add("a.txt", b"1"), create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert api.model_info("me/model").sha == before
    assert api.model_info("me/model", revision="refs/pr/1").sha == made.oid


def test_the_same_files_again_are_no_commit(api):
    made = commit(api, add("a.txt", b"1"), add("model.safetensors", WEIGHTS))
    again = commit(api, add("a.txt", b"1"), add("model.safetensors", WEIGHTS))
    assert again.oid == made.oid


def test_a_large_file_goes_up_in_parts(hub, api, tmp_path):
    content = bytes(range(251)) * 50_000  # 12.55 MB
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(content)
    commit(api, add("model.safetensors", tmp_path / "model.safetensors"))
    assert sum(r.startswith("PUT /storage/") for r in hub.log) == 3
    path = hf_hub_download("me/model", "model.safetensors", cache_dir=tmp_path / "c")
    with open(path, "rb") as file:
        assert file.read() == content


def test_a_part_that_did_not_arrive_is_missed(hub):
    hub.uploads["ticket"] = Upload(hashlib.sha256(b"right").hexdigest(), {1: b"ri"})
    parts = [
        {"partNumber": n, "etag": hashlib.md5(p).hexdigest()} for n, p in ((1, b"ri"), (2, b"ght"))
    ]
    request = Request(f"{hub.endpoint}/storage/ticket", json.dumps({"parts": parts}).encode())
    with pytest.raises(HTTPError, match="400"):
        urlopen(request)
    assert not hub.has(hub.uploads["ticket"].sha256)
    hub.uploads["ticket"].parts[2] = b"ght"
    urlopen(request)
    assert hub.has(hub.uploads["ticket"].sha256)


def test_models_are_gathered_in_a_collection(hub, api):
    api.create_repo("me/secret", private=True)
    made = api.create_collection("Two sizes", namespace="me", private=True)
    assert made.url == f"{hub.endpoint}/collections/{made.slug}" and made.slug.startswith("me/two")
    for repo in ("me/model", "me/secret"):
        api.add_collection_item(made.slug, repo, "model")
    again = api.create_collection("Two sizes", namespace="me", exists_ok=True)
    assert [item.item_id for item in again.items] == ["me/model", "me/secret"]
    for refused in (
        lambda: api.add_collection_item(made.slug, "me/model", "model"),
        lambda: api.add_collection_item(made.slug, "me/none", "model"),
        lambda: api.create_collection("Mine", namespace="readers"),
        lambda: HfApi(token=False).get_collection(made.slug),
    ):
        with pytest.raises(HfHubHTTPError, match=r"40\d"):
            refused()
    same = api.add_collection_item(made.slug, "me/model", "model", exists_ok=True)
    assert len(same.items) == 2


def test_rights(hub, api):
    hub.users |= {"hf_other": User("other"), "hf_reader": User("me", "read")}
    hub.create("me/secret", private=True)
    hub.create("me/gated", gated=True)
    hub.put("me/gated", {"a.txt": b"1"})
    other, reader = HfApi(token="hf_other"), HfApi(token="hf_reader")
    assert [a.whoami()["name"] for a in (api, other)] == ["me", "other"]
    assert reader.model_info("me/secret").private
    for stranger in (other, HfApi(token=False)):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("me/secret")
    with pytest.raises(GatedRepoError):
        hf_hub_download("me/gated", "a.txt", token="hf_other")
    for refused in (other, reader):
        with pytest.raises(HfHubHTTPError, match="403"):
            refused.create_commit("me/model", [add("a", b"1")], commit_message="no")
        with pytest.raises(HfHubHTTPError, match="403"):
            refused.create_repo("me/another")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_unknown").whoami()


def test_a_broken_download_goes_on_where_it_stopped(hub, api, tmp_path):
    commit(api, add("model.safetensors", WEIGHTS))
    hub.fail("cut", once("GET /me/model/resolve"))
    path = hf_hub_download("me/model", "model.safetensors", cache_dir=tmp_path / "c")
    with open(path, "rb") as file:
        assert file.read() == WEIGHTS
    assert sum(r.startswith("GET /me/model/resolve") for r in hub.log) == 2


def once(start):
    """Holds for the first request that starts so."""
    seen = []
    return lambda index, request: request.startswith(start) and not seen and not seen.append(index)


@pytest.mark.parametrize("how", [503, "close", "cut", "lose"])
def test_it_fails_as_it_is_told(hub, api, how):
    hub.fail(how, lambda index, request: "whoami" in request)
    with pytest.raises(Exception, match=r"503|disconnected|peer closed"):
        api.whoami()
    hub.heal()
    assert api.whoami()["name"] == "me"


def test_a_content_that_is_not_what_its_hash_says_is_refused(hub, api):
    wanted = hashlib.sha256(b"right").hexdigest()
    hub.uploads["ticket"] = Upload(wanted)
    request = Request(f"{hub.endpoint}/storage/ticket", b"wrong", method="PUT")
    with pytest.raises(HTTPError, match="400"):
        urlopen(request)
    assert not (hub.folder / wanted).exists()
