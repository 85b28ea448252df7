"""Publishing, by the real client against a Hub on loopback: what arrives, what is refused before
anything is sent, and that no failure on the way harms what was there.
"""

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
import saved
import torch
import yaml
from huggingface_hub import HfApi, constants
from test_data import sentences, tiny_tokenizer, write

import hfprune
from hfprune.data import commit_of, load_splits
from hfprune.errors import HfpruneError, PublishError
from hfprune.publishing.hub import publish
from hfprune.publishing.page import write_page
from hfprune.publishing.parcel import RECORD, packed
from hfprune.publishing.rehearsal_store import User
from hfprune.publishing.secrets import refuse_secrets
from hfprune.recipe import Data, Recipe
from hfprune.steps import steps_done

MODEL_FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "modeling_hfprune.py",
    "tokenizer.json",
    "tokenizer_config.json",
}
TOUCHED = re.compile(r"PUT |POST /api/(repos/create|models/.*/(commit|branch|preupload)/)")


def quietly(source, repo="me/model", **options):
    """Publish without loading the result in a fresh process, which takes seconds."""
    return publish(source, repo, **{"verify": False, "say": lambda line: None} | options)


def files(hub, repo="me/model", revision="main"):
    """{path: content} of a revision."""
    found = hub.repos[repo]
    commit = found.commits[found.find(revision)]
    return {path: hub.content(blob) for path, blob in commit.files.items()}


def untouched(hub):
    """Whether nothing was sent that changes anything."""
    return not [request for request in hub.log if TOUCHED.match(request)]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return saved.save(tmp_path_factory.mktemp("first") / "model")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return saved.save(tmp_path_factory.mktemp("second") / "model", seed=1)


@pytest.fixture
def model(first, tmp_path):
    """A pruned model's folder of the test's own."""
    return shutil.copytree(first, tmp_path / "model")


def test_a_folder_arrives_whole_and_is_verified(hub, model):
    said = []
    done = publish(model, "me/model", license="mit", say=said.append)
    assert files(hub).keys() == MODEL_FILES | {".gitattributes"} == {*done.files, ".gitattributes"}
    for name in MODEL_FILES - {"README.md"}:
        assert files(hub)[name] == (model / name).read_bytes()
    assert done.differences == {"hfprune": 0, "remote-code": 0}
    assert done.commit == hub.repos["me/model"].refs["refs/heads/main"]
    assert len(hub.repos["me/model"].commits) == 2  # the repository's first one, and ours
    assert any("empty cache" in line for line in said)
    assert json.loads((model / RECORD).read_text()) == {"me/model": {"main": done.commit}}
    assert b"license: mit" in files(hub)["README.md"]


def test_a_run_arrives_with_its_papers(hub, tmp_path):
    run = saved.run(tmp_path / "run")
    quietly(run)
    found = files(hub)
    papers = {"plan.json", "recipe.yaml", "report.json", "report.md", "kept.png"}
    assert found.keys() == MODEL_FILES | papers | {".gitattributes"}
    assert b"somebody" not in b"".join(found.values())  # absolute paths say who and where
    assert yaml.safe_load(found["recipe.yaml"])["data"]["test"] == "test.jsonl"
    assert json.loads(found["report.json"])["recipe"]["data"]["test"] == "test.jsonl"
    for name in papers - {"recipe.yaml", "report.json"}:
        assert found[name] == (run / name).read_bytes()


def test_places_of_any_letters_are_cut(tmp_path):
    """The report holds them as JSON and as HTML write them."""
    home = "/home/josé & <söhne>/a folder whose name is longer than a line of YAML is by default"
    recipe = json.loads(json.dumps(saved.RECIPE).replace("/home/somebody", home))
    run = saved.run(tmp_path / "run", **recipe)
    report = dataclasses.replace(saved.report(run=run), recipe=recipe)
    (run / "report.json").write_text(json.dumps(report.to_dict()))
    write_page(report, run / "report.html")
    with packed(run) as parcel:
        sent = {name: parcel.files[name] for name in ("recipe.yaml", "report.json", "report.html")}
    for name, content in sent.items():
        assert b"test.jsonl" in content, name
        assert not re.search(rb"/home|jos|longer than", content), name


def test_a_model_in_memory_arrives(hub, tmp_path):
    made = saved.pruned()
    quietly(made, processor=tiny_tokenizer())
    assert files(hub).keys() == MODEL_FILES | {".gitattributes"}
    again = hfprune.from_pretrained("me/model")
    for name, tensor in made.state_dict().items():
        assert again.state_dict()[name].equal(tensor)
    with pytest.raises(PublishError, match="own tokenizer"):
        quietly(tmp_path, processor=tiny_tokenizer())


def test_a_language_model_arrives_with_what_it_generates_by(hub):
    import tiny

    dense = tiny.model("llama")
    dense.generation_config.max_new_tokens = 7
    quietly(hfprune.remove(dense, saved.plan_of(dense)))
    found = files(hub)
    assert json.loads(found["generation_config.json"])["max_new_tokens"] == 7
    assert hfprune.from_pretrained("me/model").generation_config.max_new_tokens == 7


def test_an_image_model_arrives_with_its_processor(hub):
    import tiny
    from transformers import AutoImageProcessor, ViTImageProcessor

    dense = tiny.model("vit")
    quietly(hfprune.remove(dense, saved.plan_of(dense)), processor=ViTImageProcessor(size=24))
    assert AutoImageProcessor.from_pretrained("me/model").size["height"] == 24
    card = files(hub)["README.md"].decode()
    assert 'AutoImageProcessor.from_pretrained("me/model")' in card
    assert "tokenizer" not in card


def test_what_reads_sound_is_called_so(hub):
    import tiny
    from transformers import AutoFeatureExtractor, Wav2Vec2FeatureExtractor

    dense = tiny.model("wav2vec2")
    quietly(
        hfprune.remove(dense, saved.plan_of(dense)),
        processor=Wav2Vec2FeatureExtractor(sampling_rate=8000),
    )
    assert AutoFeatureExtractor.from_pretrained("me/model").sampling_rate == 8000
    card = files(hub)["README.md"].decode()
    assert 'Its feature extractor: `AutoFeatureExtractor.from_pretrained("me/model")`' in card


def test_a_processor_of_several_parts_is_one(hub):
    import tiny
    from transformers import AutoProcessor, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    dense = tiny.model("wav2vec2")
    both = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(sampling_rate=8000), tiny_tokenizer())
    quietly(hfprune.remove(dense, saved.plan_of(dense)), processor=both)
    assert AutoProcessor.from_pretrained("me/model").feature_extractor.sampling_rate == 8000
    card = files(hub)["README.md"].decode()
    assert 'Its processor: `AutoProcessor.from_pretrained("me/model")`' in card


def test_a_name_alone_is_under_the_user(hub, model):
    assert quietly(model, "model").repo_id == "me/model"
    assert quietly(model, "org/model", private=True).repo_id == "org/model"
    assert [repo.private for repo in hub.repos.values()] == [False, True]


def test_a_family_is_a_branch_each(hub, first, second, tmp_path):
    sizes = {
        name: shutil.copytree(f, tmp_path / name)
        for name, f in {"macs-80": first, "macs-50": second}.items()
    }
    for name, folder in sizes.items():
        quietly(folder, revision=name)
    assert set(hub.repos["me/model"].refs) == {f"refs/heads/{b}" for b in ("main", *sizes)}
    for name, folder in sizes.items():
        assert files(hub, revision=name)["config.json"] == (folder / "config.json").read_bytes()
        assert f'revision="{name}"'.encode() in files(hub, revision=name)["README.md"]
    assert set(files(hub)) == {".gitattributes"}


def test_a_pull_request_leaves_the_branch(hub, model):
    hub.create("other/model")
    done = quietly(model, "other/model", create_pr=True)
    assert done.url.endswith("/other/model/discussions/1")
    assert set(files(hub, "other/model")) == {".gitattributes"}
    assert files(hub, "other/model", "refs/pr/1").keys() > MODEL_FILES
    assert not (model / RECORD).exists()
    with pytest.raises(PublishError, match="main branch"):
        quietly(model, "other/model", create_pr=True, revision="other")


def test_a_folder_that_cannot_remember_is_published_all_the_same(hub, model, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("hfprune.publishing.parcel.write_whole", refuse)
    said = []
    done = quietly(model, say=said.append)
    assert done.commit == hub.repos["me/model"].refs["refs/heads/main"]
    assert any("cannot remember it (Permission denied)" in line for line in said)


def test_a_memory_that_cannot_be_read_is_named(hub, model):
    (model / RECORD).write_text('{"me/mod')
    with pytest.raises(PublishError, match=r"published\.json cannot be read.*Delete it"):
        quietly(model)
    assert untouched(hub)


def test_the_same_again_changes_nothing(hub, model):
    before = quietly(model)
    said = []
    assert quietly(model, say=said.append).commit == before.commit
    assert any("exactly these files" in line for line in said)
    assert len(hub.repos["me/model"].commits) == 2


def test_leftovers_of_an_earlier_model_go(hub, tmp_path):
    folder = saved.save(tmp_path / "model", max_shard_size="20KB")
    shards = {path.name for path in folder.glob("model*.safetensors*")}
    assert len(shards) > 2
    quietly(folder)
    assert shards < files(hub).keys()
    hub.put("me/model", {"README.md": b"# Mine\n"})
    for name in shards:
        (folder / name).unlink()
    saved.save(folder)
    quietly(folder)
    assert files(hub).keys() == MODEL_FILES | {".gitattributes"}
    assert b"# Mine" in files(hub)["README.md"]


def test_weights_that_others_keep_in_folders_stay(hub, model):
    quietly(model)
    head = hub.put("me/model", {"lora/adapter_model.safetensors": b"theirs"})
    quietly(saved.save(model, seed=1), parent_commit=head)
    assert files(hub)["lora/adapter_model.safetensors"] == b"theirs"


def test_what_is_no_part_of_a_model_stays_here(hub, model):
    checkpoint = shutil.copytree(model, model / "checkpoint-500").name
    strangers = (".env", "optimizer.pt", "training_args.bin", "trainer_state.json", "own.py")
    strangers += (f"{checkpoint}/trainer_state.json", "run/trainer_state.json")
    for name in strangers:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("private")
    said = []
    quietly(model, say=said.append)
    assert files(hub).keys() == MODEL_FILES | {".gitattributes"}
    for name in (*strangers, f"{checkpoint}/model.safetensors"):
        assert any(name in line for line in said)


# What is refused before anything is sent.


def test_commits_of_others_are_not_overwritten(hub, model, second):
    quietly(model)
    theirs = hub.put("me/model", {"config.json": b"{}"})
    saved.save(model, seed=1)
    hub.log.clear()
    with pytest.raises(PublishError, match=r"has commits since .* config\.json.*--parent"):
        quietly(model)
    assert untouched(hub)
    assert quietly(model, parent_commit=theirs).commit != theirs
    # A folder that was never published does not know what is there.
    hub.log.clear()
    with pytest.raises(PublishError, match="from elsewhere"):
        quietly(shutil.copytree(second, model.parent / "other"), license="mit", repo="me/model")
    assert untouched(hub)


@pytest.mark.parametrize(
    ("repo", "user", "message"),
    [
        ("other/model", User("me"), "may not write to other/model.* me"),
        ("org/model", User("me", "write", {"org": "read"}), "may not write to org/model"),
        ("me/model", User("me", "read"), "may only read"),
        ("me/model", User("me", "fineGrained", {}, {"me": ["repo.content.read"]}), "fine-grained"),
        ("me/model", User("me", "fineGrained", {}, {"org": ["repo.write"]}), "fine-grained"),
        ("me/mod el", User("me"), "Repo id must use alphanumeric"),
    ],
)
def test_a_token_must_be_allowed_to_write(hub, model, repo, user, message):
    hub.users.update(dict.fromkeys(hub.users, user))
    with pytest.raises(PublishError, match=message):
        quietly(model, repo)
    assert untouched(hub)


def test_a_token_for_one_owner_is_enough(hub, model):
    (token,) = hub.users
    hub.users[token] = User("me", "fineGrained", {}, {"me": ["repo.content.read", "repo.write"]})
    assert quietly(model).commit == hub.repos["me/model"].refs["refs/heads/main"]


def test_without_a_token_or_a_network_it_says_so(hub, model, monkeypatch):
    with pytest.raises(PublishError, match="does not know this token"):
        quietly(model, token="hf_unknown")
    with pytest.raises(PublishError, match="There is no me/none to propose"):
        quietly(model, "me/none", create_pr=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="no token"):
        quietly(model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        quietly(model)
    assert untouched(hub)


def test_what_shall_be_private_is_not_put_where_all_can_see_it(hub, model):
    hub.create("me/model")
    with pytest.raises(PublishError, match="is there and public"):
        quietly(model, private=True)
    assert untouched(hub)


@pytest.mark.parametrize("kind", ["gated", "private"])
def test_a_restricted_base_is_published_as_said(hub, tmp_path, kind):
    hub.create("org/base", **{kind: True})
    words = {} if kind == "gated" else {"README.md": b"---\nlicense: other\n---\n"}
    revision = hub.put("org/base", words)  # without a card, too
    folder = saved.save(tmp_path / "model", base={"id": "org/base", "revision": revision})
    with pytest.raises(PublishError, match=f"{kind}.*--private or --public"):
        quietly(folder)
    assert untouched(hub)
    quietly(folder, private=True)
    assert hub.repos["me/model"].private


def test_a_missing_license_and_base_are_warned_of(hub, model):
    warnings = " ".join(quietly(model).warnings)
    assert "No license is known" in warnings and "did not come from the Hub" in warnings
    assert not [w for w in quietly(model, license="mit").warnings if "license" in w]


def test_only_finished_runs_and_pruned_models(hub, tmp_path):
    for folder, message in (
        (tmp_path / "nothing", "There is no folder"),
        (tmp_path, "is no model"),
    ):
        with pytest.raises(PublishError, match=message):
            quietly(folder)
    import tiny

    dense = tiny.model("bert")
    dense.save_pretrained(tmp_path / "dense")
    for source in (dense, tmp_path / "dense"):
        with pytest.raises(PublishError, match="not pruned by hfprune"):
            quietly(source)
    run = saved.run(tmp_path / "run")
    (run / "report.json").unlink()
    with pytest.raises(PublishError, match=r"not finished: it has no report\.json"):
        quietly(run)
    assert not hub.log


def test_a_dry_run_opens_nothing_and_needs_nothing(hub, model, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    done = quietly(model, dry_run=tmp_path / "dry")
    assert {path.name for path in (tmp_path / "dry").iterdir()} == MODEL_FILES == {*done.files}
    assert done.commit is None
    assert not hub.log
    with pytest.raises(PublishError, match="exists"):
        quietly(model, dry_run=tmp_path / "dry")


# Secrets.

SECRET = "hf_" + "abcdEFGH1234" * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"model": SECRET},
        {"data": {"train": f"https://me:{SECRET}@example.org/train"}},
        {"data": {"train": "https://me:pass@example.org/train"}},
        {"api_key": "abc"},
        {"score": {"hub_token": "abc"}},
    ],
)
def test_a_recipe_with_a_secret_is_refused(hub, tmp_path, changes):
    run = saved.run(tmp_path / "run", **changes)
    for options in ({}, {"dry_run": tmp_path / "dry"}):
        with pytest.raises(HfpruneError, match=r"recipe\.yaml.* looks like a secret") as caught:
            quietly(run, **options)
        assert SECRET not in str(caught.value)
    assert not hub.log
    assert not (tmp_path / "dry").exists()


def test_names_that_only_begin_like_a_token_are_none(tmp_path):
    run = saved.run(tmp_path / "run", model="org/hf_movie_reviews_sentiment_model")
    with packed(run) as parcel:
        assert parcel.recipe["model"] == "org/hf_movie_reviews_sentiment_model"
    with pytest.raises(HfpruneError, match="looks like a secret"):
        refuse_secrets(f"runs/token_{SECRET}", "here")


def test_other_files_with_a_secret_are_refused(hub, model):
    (model / "notes.txt").write_text(f"login with {SECRET}\n")
    with pytest.raises(HfpruneError, match=r"notes\.txt looks like a secret"):
        quietly(model)
    assert not hub.log


@pytest.mark.parametrize("how", [None, 500, "close", "cut"])
def test_the_token_is_nowhere(hub, model, tmp_path, how, capfd, caplog):
    (token,) = hub.users
    if how:
        hub.fail(how, lambda index, request: "/commit/" in request or "whoami" in request)
    caplog.set_level("DEBUG")
    text = ""
    try:
        text += repr(publish(model, "me/model", token=token, verify=False))
    except PublishError as error:
        text += "".join(traceback.format_exception(error))
    assert bool(how) == ("PublishError" in text)
    text += "".join(capfd.readouterr()) + caplog.text + repr(hub.log)
    assert token not in text
    for path in tmp_path.rglob("*"):
        assert not (path.is_file() and token.encode() in path.read_bytes()), path


# Failures on the way.


class Scene:
    """A repository with a published model, and a newer model that is to be published over it."""

    def __init__(self, hub, first, second, folder):
        self.hub, self.folder = hub, folder
        shutil.copytree(first, folder)
        quietly(folder)
        for path in second.iterdir():
            shutil.copyfile(path, folder / path.name)
        self.before = files(hub)
        self.record = (folder / RECORD).read_bytes()
        self.repos, self.blobs = copy.deepcopy(hub.repos), set(os.listdir(hub.folder))
        hub.log.clear()
        quietly(folder)
        self.requests, self.after = list(hub.log), files(hub)
        self.reset()

    def reset(self):
        self.hub.heal()
        self.hub.log.clear()
        self.hub.repos = copy.deepcopy(self.repos)
        (self.folder / RECORD).write_bytes(self.record)
        for name in set(os.listdir(self.hub.folder)) - self.blobs:
            (self.hub.folder / name).unlink()

    def survives(self, how, when):
        """Publish while it fails, then again: True if the first time failed."""
        self.hub.fail(how, when)
        failed = False
        try:
            quietly(self.folder)
        except PublishError:
            failed = True
            assert files(self.hub) in (self.before, self.after)
        self.hub.heal()
        quietly(self.folder)
        assert files(self.hub) == self.after
        assert len(self.hub.repos["me/model"].commits) == len(self.repos["me/model"].commits) + 1
        self.reset()
        return failed


@pytest.fixture
def scene(hub, first, second, tmp_path):
    return Scene(hub, first, second, tmp_path / "model")


def test_the_scene_has_all_that_can_fail(scene):
    told = " ".join(scene.requests)
    for part in ("whoami", "/tree/", "validate-yaml", "preupload", "lfs", "PUT /storage", "commit"):
        assert part in told
    assert scene.before != scene.after


@pytest.mark.parametrize(
    "how", ["lose", *(pytest.param(how, marks=pytest.mark.slow) for how in (429, 500, 503, "cut"))]
)
def test_one_failure_at_any_request_harms_nothing(scene, how):
    for position in range(len(scene.requests)):
        scene.survives(how, lambda index, request, at=position: index == at)


@pytest.mark.parametrize("how", ["close", pytest.param(503, marks=pytest.mark.slow)])
def test_a_network_that_dies_at_any_request_harms_nothing(scene, how):
    for position in range(len(scene.requests)):
        assert scene.survives(how, lambda index, request, at=position: index >= at)


def test_a_new_repository_survives_a_dying_network_too(hub, model):
    quietly(model, revision="small")
    requests = list(hub.log)
    assert any("branch" in request for request in requests)
    for position in range(len(requests)):
        hub.repos.clear()
        hub.log.clear()
        for path in hub.folder.iterdir():
            path.unlink()
        (model / RECORD).unlink(missing_ok=True)
        hub.fail("close", lambda index, request, at=position: index >= at)
        with pytest.raises(PublishError):
            quietly(model, revision="small")
        hub.heal()
        quietly(model, revision="small")
        assert files(hub, revision="small").keys() == MODEL_FILES | {".gitattributes"}


def test_weights_that_go_up_in_parts_harm_nothing_on_the_way_either(hub, first, second, tmp_path):
    hub.part_bytes = 20_000
    scene = Scene(hub, first, second, tmp_path / "model")
    parts = [at for at, request in enumerate(scene.requests) if request.startswith("PUT /storage/")]
    assert len(parts) > 2 and f"POST {scene.requests[parts[0]].split()[1][:-2]}" in scene.requests
    for position in range(parts[0], len(scene.requests)):
        assert scene.survives("close", lambda index, request, at=position: index >= at)
        scene.survives("lose", lambda index, request, at=position: index == at)


def test_weights_that_do_not_go_up_by_xet_harm_nothing(scene, monkeypatch):
    """Xet is another way for the weights; the commit comes after it, as ever. This Hub has none."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(PublishError, match="Uploading failed"):
        quietly(scene.folder)
    assert any("xet-write-token" in request for request in scene.hub.log)
    assert files(scene.hub) == scene.before
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    quietly(scene.folder)
    assert files(scene.hub) == scene.after


PUSH = "import sys; from hfprune.cli import main; sys.argv[0] = 'hfprune'; main()"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["/commit/", "PUT /storage"])
def test_a_killed_push_harms_nothing(scene, place, tmp_path):
    hub = scene.hub
    hub.fail("hang", lambda index, request: place in request)
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    arguments = ["push", str(scene.folder), "me/model"]
    process = subprocess.Popen([sys.executable, "-c", PUSH, *arguments], env=environment)
    deadline = time.monotonic() + 60
    while not any(place in request for request in hub.log) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(place in request for request in hub.log)
    hub.heal()
    assert files(hub) == scene.before
    quietly(scene.folder)
    assert files(hub) == scene.after


def test_a_download_that_differs_is_told(hub, model):
    def meddle(index, request):
        if request.startswith("GET /me/model/resolve/") and request.endswith("config.json"):
            blob = hub.repos["me/model"]
            commit = blob.commits[blob.find("main")]
            (hub.folder / commit.files["config.json"].sha256).write_bytes(b"{}" * 3000)
        return False

    hub.fail(500, meddle)
    with pytest.raises(PublishError, match=r"config\.json|Downloading"):
        publish(model, "me/model", say=lambda line: None)


# The stock methods.


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_the_stock_methods_upload_all_that_a_folder_holds(hub, way, tmp_path):
    model = saved.pruned()
    model.save_pretrained(tmp_path / "there")
    if way == "push_to_hub":
        model.push_to_hub("me/model")
    else:
        model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model")
    found = files(hub)
    for path in (tmp_path / "there").iterdir():
        assert found[path.name] == path.read_bytes(), path.name
    again = hfprune.from_pretrained("me/model", attn_implementation="eager")
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_the_card_of_a_stock_push_is_kept_as_a_persons(hub, model):
    saved.pruned().push_to_hub("me/model")
    HfApi().upload_file(
        path_or_fileobj=b"# By hand\n", path_in_repo="README.md", repo_id="me/model"
    )
    head = hub.repos["me/model"].refs["refs/heads/main"]
    quietly(model, parent_commit=head)
    assert b"# By hand" in files(hub)["README.md"]


# Where the dense model and the data came from.


@pytest.fixture
def datasets_of(hub, tmp_path, monkeypatch):
    """The data sets' client talks to the Hub of the test, too."""
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "data")


def test_a_run_remembers_which_commits_its_model_and_data_are(hub, tmp_path, datasets_of):
    import tiny

    write(tmp_path, train=sentences(8), dev=sentences(4, 1), test=sentences(4, 2))
    hub.create("me/movies")
    data = hub.put("me/movies", {p.name: p.read_bytes() for p in tmp_path.glob("*.jsonl")})
    tiny.model("bert", "AutoModelForSequenceClassification").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    hub.create("me/dense")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
    commit = hub.put("me/dense", contents)
    recipe = Recipe.from_dict(
        {
            "model": "me/dense",
            "output": str(tmp_path / "run"),
            "data": {"dataset": "me/movies", "train": "train", "dev": "validation", "test": "test"},
            "measure": {"batch_sizes": [1]},
        }
    )
    hfprune.run(recipe, say=lambda line: None, until="dense")
    assert steps_done(tmp_path / "run")["dense"]["commits"] == {"model": commit, "data": data}
    hub.put("me/dense", {"README.md": b"# Another commit\n"})
    dense = hfprune.from_pretrained(tmp_path / "run" / "dense")
    again = hfprune.from_pretrained("me/dense", revision=commit)
    for model in (dense, again):
        pruned = hfprune.remove(model, saved.plan_of(model))
        assert pruned.config.hfprune["base"] == {"id": "me/dense", "revision": commit}


def test_a_data_set_is_read_at_its_revision(hub, datasets_of):
    hub.create("me/movies")

    def put(text):
        row = json.dumps({"text": text, "label": 1}).encode()
        return hub.put("me/movies", dict.fromkeys(("train.jsonl", "test.jsonl"), row))

    commits = [put("good"), put("bad")]
    names = {"train": "train", "dev": "train", "test": "test"}
    for commit, text in zip(commits, ("good", "bad"), strict=True):
        loaded = load_splits(Data(dataset="me/movies", revision=commit, **names))
        assert {split: dataset["text"][0] for split, dataset in loaded.items()} == dict.fromkeys(
            names, text
        )
        assert {commit_of(dataset) for dataset in loaded.values()} == {commit}
    latest = load_splits(Data(dataset="me/movies", **names))
    assert commit_of(latest["train"]) == commits[-1]
