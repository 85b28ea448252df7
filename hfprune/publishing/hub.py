"""Publish a pruned model on the Hub: check first, upload in one commit, then download what was
uploaded into an empty cache, load it with and without hfprune, and compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from hfprune.errors import CheckpointError, PublishError
from hfprune.publishing.card import card
from hfprune.publishing.client import MAIN, Client, digest, left_over, same, told
from hfprune.publishing.parcel import CARD, Parcel, packed, record, recorded, write_out
from hfprune.publishing.reload import WAYS, reload_and_compare
from hfprune.publishing.secrets import refuse_secrets
from hfprune.structure.checkpoint import from_pretrained
from hfprune.structure.modeling_hfprune import probe


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
        client = Client(token)
        with told("Checking"):
            name = client.target(repo_id, create_pr)
            known = parent_commit or recorded(source, name, branch)
            there = client.look(name, branch, create_pr)
            if private and there.private is False:
                raise PublishError(
                    f"{name} is there and public. Make it private on its page first, or choose"
                    " another name."
                )
            inherited, warnings = client.inherit(parcel, there.private, private)
        text = card(parcel, name, branch, inherited, there.card, license)
        if "\nlicense:" not in text.partition("\n---\n")[0]:
            warnings.append("No license is known: nobody may use the model. Give `license`.")
        refuse_secrets(text, CARD)
        files: dict[str, Path | bytes] = {**parcel.files, CARD: text.encode()}
        for warning in warnings:
            say(f"  warning: {warning}")
        gone = left_over(there.files, files)
        if there.head and not gone and all(same(files[p], there.files.get(p)) for p in files):
            commit, url = there.head, f"{client.api.endpoint}/{name}/commit/{there.head}"
            say(f"{name} has exactly these files already: commit {commit}")
        else:
            if not create_pr:
                with told("Checking"):
                    client.refuse_strangers(name, branch, there, known)
            say(f"Uploading {len(files)} files, {parcel.size / 1e6:,.1f} MB, to {name} ({branch})")
            with told("Uploading"):
                commit, url = client.upload(name, branch, files, gone, there, private, create_pr)
            say(f"Uploaded as one commit: {url}")
        if not create_pr:
            record(source, name, branch, commit)
        found = _verify(client, parcel, files, name, commit, say) if verify else {}
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


def _verify(
    client: Client,
    parcel: Parcel,
    files: Mapping[str, Path | bytes],
    name: str,
    commit: str,
    say: Callable[[str], None],
) -> dict[str, float | None]:
    """Download a commit into an empty cache, compare bytes, load it both ways, compare outputs.

    Raises:
        PublishError: what came down is not what was published.
    """
    from huggingface_hub import constants, snapshot_download

    with TemporaryDirectory(prefix="hfprune-verify-") as home:
        cache = Path(home, "hub")
        with told("Downloading what was uploaded"):
            folder = Path(
                snapshot_download(name, revision=commit, cache_dir=cache, token=client.token)
            )
        for path, file in files.items():
            if digest(file, "sha256") != digest(folder / path, "sha256"):
                raise PublishError(f"{path} came down from {name} with another content.")
        say(f"Downloaded into an empty cache: {len(files)} files, the same bytes")
        model = from_pretrained(parcel.model)
        ways = ["hfprune", "stock" if parcel.is_stock else "remote-code"]
        environment = {
            "HF_HOME": home,
            "HF_HUB_CACHE": str(cache),
            "HF_MODULES_CACHE": str(Path(home, "modules")),
            "HF_ENDPOINT": client.api.endpoint,
            "HF_TOKEN": client.token,
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
            said = str(error).replace(client.token, "<token>")
            raise PublishError(f"It was uploaded, but: {said}") from None
    for way, difference in found.items():
        how = "not compared" if difference is None else f"differ by {difference:g} at most"
        say(f"Loaded by {WAYS[way]}: outputs {how}")
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
