"""Publish a pruned model on the Hub: check first, upload in one commit, then download what was
uploaded into an empty cache, load it with and without hfprune, and compare.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hfprune.errors import CheckpointError, HfpruneError, PublishError
from hfprune.publishing.card import Inherited, base_of, card
from hfprune.publishing.parcel import (
    CARD,
    SHIM,
    Parcel,
    packed,
    record,
    recorded,
    write_out,
)
from hfprune.publishing.reload import WAYS, reload_and_compare
from hfprune.publishing.secrets import refuse_secrets
from hfprune.structure.checkpoint import from_pretrained
from hfprune.structure.modeling_hfprune import probe

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
_OURS = {SHIM, "plan.json", "recipe.yaml", "report.json", "report.md", "report.html", "kept.png"}
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True)
class Published:
    """What was published, and what was verified.

    Attributes:
        repo_id, revision: where; after a dry run, where it would have been.
        commit: its name; None after a dry run.
        url: of the commit or the pull request; after a dry run, the folder.
        files: paths in the repository.
        differences: {way to load: largest difference of the outputs, None where no batch is known
            to compare them on}; {} if it was not verified.
        warnings: what a person should look at.
    """

    repo_id: str
    revision: str
    commit: str | None
    url: str
    files: tuple[str, ...]
    differences: Mapping[str, float | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _There:
    """What is at the target before: {path: etag} and the card, of a commit; private or not."""

    head: str | None = None
    private: bool | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    card: str = ""
    is_new_branch: bool = False


def publish(
    source: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    parent_commit: str | None = None,
    processor: Any = None,
    license: str | None = None,
    dry_run: str | os.PathLike[str] | None = None,
    verify: bool = True,
    say: Callable[[str], None] = print,
) -> Published:
    """Put a pruned model on the Hub, with its card, plan, recipe and report, in one commit.

    Everything that can be checked is checked before anything is uploaded. If it fails on the way,
    the repository's previous revision stays as it was, and the same call goes on.

    Args:
        source: the folder of a run, the folder of a saved pruned model, or a pruned model.
        repo_id: "owner/name"; "name" alone is under the token's user.
        private: whether a new repository is private; None for the Hub's default.
        revision: branch, which is made if it is not there; None for the main one.
        create_pr: propose the commit as a pull request.
        token: that may write; None for the one of `hf auth login` or HF_TOKEN.
        parent_commit: publish on top of this commit, though others have made it.
        processor: tokenizer or processor to publish with a model in memory.
        license: of the pruned model; None for the base model's.
        dry_run: write the folder that would be uploaded here, and open no connection: without what
            is taken over from the base model's card and from the card that is there.
        verify: download the result into an empty cache, load it both ways and compare outputs.
        say: where progress goes, line by line.

    Raises:
        PublishError: no token or one that may not write, a name that belongs to another, commits
            that this was not made from, offline mode, a restricted base; or the upload failed, or
            what came down differs.
        HfpruneError: a file holds what looks like a secret.
    """
    if create_pr and revision not in (None, MAIN):
        raise PublishError("A pull request goes to the main branch; give no revision with it.")
    branch = revision or MAIN
    with packed(source, processor) as parcel:
        for name in parcel.left_out:
            say(f"  left out, no part of the model: {name}")
        if dry_run is not None:
            return _write(parcel, repo_id, branch, license, Path(dry_run))
        client = _Client(token, say)
        with _told("Checking"):
            name = client.target(repo_id, create_pr)
            known = parent_commit or recorded(source, name, branch)
            there = client.look(name, branch, create_pr)
            inherited, warnings = client.inherit(parcel, there.private, private)
        text = card(parcel, name, branch, inherited, there.card, license)
        if "\nlicense:" not in text.partition("\n---\n")[0]:
            warnings.append("No license is known: nobody may use the model. Give `license`.")
        refuse_secrets(text, CARD)
        files: dict[str, Path | bytes] = {**parcel.files, CARD: text.encode()}
        for warning in warnings:
            say(f"  warning: {warning}")
        gone = _left_over(there.files, files)
        if there.head and not gone and all(_same(files[p], there.files.get(p)) for p in files):
            commit, url = there.head, f"{client.api.endpoint}/{name}/commit/{there.head}"
            say(f"{name} has exactly these files already: commit {commit}")
        else:
            if not create_pr:
                with _told("Checking"):
                    client.refuse_strangers(name, branch, there, known)
            say(f"Uploading {len(files)} files, {parcel.size / 1e6:,.1f} MB, to {name} ({branch})")
            with _told("Uploading"):
                commit, url = client.upload(name, branch, files, gone, there, private, create_pr)
            say(f"Uploaded as one commit: {url}")
        if not create_pr:
            record(source, name, branch, commit)
        found = client.verify(parcel, files, name, commit) if verify else {}
        return Published(name, branch, commit, url, tuple(files), found, tuple(warnings))


def _write(
    parcel: Parcel, repo_id: str, branch: str, license: str | None, folder: Path
) -> Published:
    """The dry run."""
    text = card(parcel, repo_id, branch, license=license)
    refuse_secrets(text, CARD)
    files: dict[str, Path | bytes] = {**parcel.files, CARD: text.encode()}
    write_out(files, folder)
    return Published(repo_id, branch, None, str(folder), tuple(files))


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """Whatever the client and the network raise, as one sentence and what to do."""
    try:
        yield
    except HfpruneError:
        raise
    except Exception as error:  # the client raises its own, httpx's, RuntimeError and ValueError
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        why = " ".join(str(cause).split()) or type(cause).__name__
        why = re.sub(r"\?[^\s'\"]+", "", why)  # the query of an upload's address is a permission
        raise PublishError(
            f"{doing} failed: {why}. What was there before stays until a commit is complete; run"
            " it again to go on."
        ) from error


class _Client:
    """The Hub, as one token sees it."""

    def __init__(self, token: str | None, say: Callable[[str], None]) -> None:
        from huggingface_hub import HfApi, constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise PublishError(
                "HF_HUB_OFFLINE is set, so nothing can be published. Unset it, or make a dry run."
            )
        found = token or get_token()
        if not found:
            raise PublishError(
                "There is no token for the Hub. Log in with `hf auth login`, set HF_TOKEN, or make"
                " a dry run."
            )
        self.token = found
        self.api: HfApi = HfApi(token=self.token, library_name="hfprune")
        self.say = say

    def target(self, repo_id: str, create_pr: bool) -> str:
        """The full name of the repository, if the token may write there."""
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        try:
            account = self.api.whoami(token=self.token)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 401:
                raise PublishError(
                    "The Hub does not know this token. Log in again with `hf auth login`, or set"
                    " HF_TOKEN to a token that may write."
                ) from error
            raise
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise PublishError(
                f"The token of {account['name']} may only read. Make one that may write at"
                " https://huggingface.co/settings/tokens."
            )
        mine = {account["name"]: "write"}
        mine |= {org["name"]: org.get("roleInOrg", "write") for org in account.get("orgs", [])}
        owner, _, name = repo_id.rpartition("/")
        owner = owner or account["name"]
        if not create_pr and mine.get(owner, "read") == "read":
            may = ", ".join(name for name, role in mine.items() if role != "read")
            raise PublishError(
                f"{account['name']} may not write to {owner}/{name}; the token may write below:"
                f" {may}. Choose one of these, or propose it with a pull request."
            )
        return f"{owner}/{name}"

    def look(self, name: str, branch: str, create_pr: bool) -> _There:
        """What is at the target now."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        is_new = False
        try:
            info = self.api.model_info(name, revision=branch)
        except RepositoryNotFoundError:
            if create_pr:
                raise PublishError(f"There is no {name} to propose anything to.") from None
            return _There()
        except RevisionNotFoundError:
            info, is_new = self.api.model_info(name), True
        files = self._tree(name, str(info.sha))
        text = ""
        if CARD in files:
            with TemporaryDirectory(prefix="hfprune-card-") as cache:
                path = hf_hub_download(
                    name, CARD, revision=info.sha, token=self.token, cache_dir=cache
                )
                text = Path(path).read_text(encoding="utf-8")
        is_new = is_new or (branch != MAIN and info.sha == self.api.model_info(name).sha)
        return _There(info.sha, info.private, files, text, is_new)

    def _tree(self, name: str, commit: str) -> dict[str, str]:
        """{path: git's name of the content, or sha256 of a large one} of a commit."""
        from huggingface_hub import RepoFile

        entries = self.api.list_repo_tree(name, recursive=True, revision=commit)
        return {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def refuse_strangers(self, name: str, branch: str, there: _There, known: str | None) -> None:
        """Refuse to publish over commits that this model was not published on top of.

        What a person has changed in the card is kept anyway, so that does not count.
        """
        from huggingface_hub.errors import RevisionNotFoundError

        head = there.head
        if head is None or head == known or there.is_new_branch:
            return
        try:
            before = self._tree(name, known) if known else {}
        except RevisionNotFoundError:  # the repository was made anew, or its history was squashed
            before, known = {}, None
        paths = before.keys() | there.files.keys()
        changed = {p for p in paths if before.get(p) != there.files.get(p)}
        changed -= {CARD, ".gitattributes"}
        if not changed:
            return
        since = f"since it was published from here ({known[:12]})" if known else "from elsewhere"
        raise PublishError(
            f"{name} ({branch}) has commits {since}, which would be overwritten: commit {head}"
            f" changes {', '.join(sorted(changed)[:5])}. Publish on top of it with parent_commit="
            f'"{head}" (--parent {head}), to another revision, or as a pull request.'
        )

    def inherit(
        self, parcel: Parcel, is_private: bool | None, private: bool | None
    ) -> tuple[Inherited | None, list[str]]:
        """What the base model's card says, and warnings.

        Raises:
            PublishError: the base is gated or private, the result would be public, and nobody has
                said that it should.
        """
        base = base_of(parcel)
        if base is None:
            return None, ["The base model did not come from the Hub: the card does not name it."]
        from huggingface_hub import ModelCard

        try:
            info = self.api.model_info(base[0], revision=base[1])
            restricted = "private" if info.private else "gated" if info.gated else ""
            data = ModelCard.load(base[0], token=self.token, ignore_metadata_errors=True).data
        except Exception as error:  # the base is not ours: without it, the card says less
            said = str(error).strip().splitlines()[0]
            return None, [
                f"The card of {base[0]} could not be read ({said}): license, language and data sets"
                " are not taken over from it."
            ]
        if restricted and private is None and not is_private:
            raise PublishError(
                f"The base model {base[0]} is {restricted}, and the pruned one would be public. See"
                " whether its license allows that, then say private=True or private=False"
                " (--private or --public)."
            )
        metadata = {k: v for k, v in data.to_dict().items() if k in _INHERITED}
        return Inherited(metadata, restricted), []

    def upload(
        self,
        name: str,
        branch: str,
        files: Mapping[str, Path | bytes],
        gone: list[str],
        there: _There,
        private: bool | None,
        create_pr: bool,
    ) -> tuple[str, str]:
        """One commit with everything; its name and address."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = there.head
        if head is None:
            self.api.create_repo(name, private=private, exist_ok=True)
            head = self.api.model_info(name).sha
        if branch != MAIN and (there.head is None or there.is_new_branch):
            self.api.create_branch(name, branch=branch, exist_ok=True)
        made = self.api.create_commit(
            name,
            [
                *(CommitOperationAdd(path, file) for path, file in files.items()),
                *(CommitOperationDelete(path) for path in gone),
            ],
            commit_message="Publish a model pruned by hfprune",
            revision=branch,
            create_pr=create_pr,
            parent_commit=head,
        )
        return made.oid, made.pr_url or made.commit_url

    def verify(
        self, parcel: Parcel, files: Mapping[str, Path | bytes], name: str, commit: str
    ) -> dict[str, float | None]:
        """Download a commit into an empty cache, compare bytes, load it both ways, compare outputs.

        Raises:
            PublishError: what came down is not what was published.
        """
        from huggingface_hub import constants, snapshot_download

        with TemporaryDirectory(prefix="hfprune-verify-") as home:
            cache = Path(home, "hub")
            with _told("Downloading what was uploaded"):
                folder = Path(
                    snapshot_download(name, revision=commit, cache_dir=cache, token=self.token)
                )
            for path, file in files.items():
                if _digest(file, "sha256") != _digest(folder / path, "sha256"):
                    raise PublishError(f"{path} came down from {name} with another content.")
            self.say(f"Downloaded into an empty cache: {len(files)} files, the same bytes")
            model = from_pretrained(parcel.model)
            ways = ["hfprune", "stock" if parcel.is_stock else "remote-code"]
            environment = {
                "HF_HOME": home,
                "HF_HUB_CACHE": str(cache),
                "HF_MODULES_CACHE": str(Path(home, "modules")),
                "HF_ENDPOINT": self.api.endpoint,
                "HF_TOKEN": self.token,
                "HF_HUB_OFFLINE": "0",
                "TRANSFORMERS_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1" if constants.HF_HUB_DISABLE_XET else "0",
            }
            try:
                found = reload_and_compare(
                    name,
                    model,
                    _readable_probe(model),
                    ways,
                    revision=commit,
                    environment=environment,
                )
            except CheckpointError as error:
                said = str(error).replace(self.token, "<token>")
                raise PublishError(f"It was uploaded, but: {said}") from None
        for way, difference in found.items():
            how = "not compared" if difference is None else f"differ by {difference:g} at most"
            self.say(f"Loaded by {WAYS[way]}: outputs {how}")
        return found


def _readable_probe(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """A small batch that the model reads; {} if none is known."""
    batch = probe(model) or {}
    try:
        with torch.no_grad():
            model(**batch)
    except Exception:  # every family has its own way of saying no
        return {}
    return batch


def _left_over(there: Mapping[str, str], files: Mapping[str, Path | bytes]) -> list[str]:
    """Files of an earlier model that would be taken for parts of this one."""
    return [
        path
        for path in there
        if path not in files
        and (
            path in _OURS
            or path.startswith("figures/")
            or path.endswith((".safetensors", ".safetensors.index.json"))
        )
    ]


def _digest(file: Path | bytes, kind: str) -> str:
    """The sha256 of a content, or git's name of it ("git")."""
    if kind == "sha256" and isinstance(file, Path):
        with file.open("rb") as opened:  # weights need not fit into memory twice
            return hashlib.file_digest(opened, "sha256").hexdigest()
    content = file if isinstance(file, bytes) else file.read_bytes()
    if kind == "sha256":
        return hashlib.sha256(content).hexdigest()
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _same(file: Path | bytes, etag: str | None) -> bool:
    """Whether a file is what the Hub has, by sha256 or by git's name of its content."""
    return etag is not None and etag == _digest(file, "sha256" if len(etag) == 64 else "git")
