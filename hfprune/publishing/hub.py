"""Publish a pruned model on the Hub: check first, upload in one commit, then download what was
uploaded into an empty cache, load it with and without hfprune, and compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from hfprune.errors import CheckpointError, PublishError
from hfprune.publishing.card import card
from hfprune.publishing.client import MAIN, Client, There, check_name, digest, left_over, same, told
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
        PublishError: no token or one that may not write, a name that no repository can have or that
            belongs to another, commits that this was not made from, offline mode, a restricted
            base; or the upload failed, or what came down differs.
        HfpruneError: a file holds what looks like a secret.
    """
    if create_pr and revision not in (None, MAIN):
        raise PublishError("A pull request goes to the main branch; give no revision with it.")
    check_name(repo_id)
    terms = Terms(private, create_pr, parent_commit, license, verify, say)
    branch = revision or MAIN
    with packed(source, processor) as parcel:
        tell([f"left out, no part of the model: {name}" for name in parcel.left_out], say)
        if dry_run is not None:
            return write(parcel, repo_id, branch, license, Path(dry_run))
        client = Client(token)
        order = prepare(client, parcel, source, repo_id, branch, terms)
        tell([f"warning: {warning}" for warning in order.warnings], say)
        return send(client, order, terms)


@dataclass(frozen=True)
class Terms:
    """How something is to be published: the arguments of `publish` that say it."""

    private: bool | None = None
    create_pr: bool = False
    parent_commit: str | None = None
    license: str | None = None
    verify: bool = True
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Order:
    """What is to be published and may be: everything is checked, nothing is sent.

    Attributes:
        parcel: the model and its papers.
        source: where they are from, which remembers its publications.
        name, branch: where to.
        there: what is there.
        files: {path: file, or its content}, with the card.
        gone: paths that are to be deleted.
        warnings: what a person should look at.
    """

    parcel: Parcel
    source: Any
    name: str
    branch: str
    there: There
    files: Mapping[str, Path | bytes]
    gone: list[str]
    warnings: list[str]

    @cached_property
    def is_there(self) -> bool:
        """Whether the branch has exactly these files already; it reads all weights once."""
        known = self.there.files
        return not self.gone and all(same(file, known.get(p)) for p, file in self.files.items())


def prepare(
    client: Client,
    parcel: Parcel,
    source: Any,
    repo_id: str,
    branch: str,
    terms: Terms,
    family: str = "",
) -> Order:
    """Check all that can be checked before anything is sent, and write the card.

    Args:
        client: the Hub.
        parcel: what is to be published.
        source: where it is from.
        repo_id: where to.
        branch: of the repository.
        terms: how.
        family: the table of all sizes, for the card of one of them.

    Raises:
        PublishError, HfpruneError: see `publish`.
    """
    with told("Checking"):
        name = client.target(repo_id, terms.create_pr)
        there = client.look(name, branch, terms.create_pr)
        if terms.private and there.private is False:
            raise PublishError(
                f"{name} is there and public. Make it private on its page first, or choose another"
                " name."
            )
        inherited, warnings = client.inherit(parcel, there.private, terms.private)
        text = card(parcel, name, branch, inherited, there.card, terms.license, family)
        if "\nlicense:" not in text.partition("\n---\n")[0]:
            warnings.append(
                "No license is known: nobody may use the model. Give `license` (--license), or"
                " write it into the card."
            )
        files = _with_card(parcel, text)
        gone = left_over(there.files, files)
        order = Order(parcel, source, name, branch, there, files, gone, warnings)
        if not terms.create_pr and not order.is_there:
            known = terms.parent_commit or recorded(source, name, branch)
            client.refuse_strangers(name, branch, there, known)
    return order


def send(client: Client, order: Order, terms: Terms) -> Published:
    """Upload what was prepared as one commit, unless it is there already, and verify it.

    Raises:
        PublishError: see `publish`.
    """
    name, branch, files, there = order.name, order.branch, order.files, order.there
    if there.head and order.is_there:
        commit, url = there.head, f"{client.api.endpoint}/{name}/commit/{there.head}"
        terms.say(f"{name} ({branch}) has exactly these files already: commit {commit}")
    else:
        megabytes = order.parcel.size / 1e6
        terms.say(f"Uploading {len(files)} files, {megabytes:,.1f} MB, to {name} ({branch})")
        with told("Uploading"):
            commit, url = client.upload(
                name, branch, files, order.gone, there, terms.private, terms.create_pr
            )
        terms.say(f"Uploaded as one commit: {url}")
    if not terms.create_pr:
        try:
            record(order.source, name, branch, commit)
        except OSError as error:  # it is published all the same
            terms.say(
                f"  warning: {order.source} cannot remember it ({error.strerror}). Next time,"
                f" publish on top of {commit} (--parent)."
            )
    found = _verify(client, order, commit, terms.say) if terms.verify else {}
    return Published(name, branch, commit, url, tuple(files), found, tuple(order.warnings))


def write(
    parcel: Parcel, repo_id: str, branch: str, license: str | None, folder: Path, family: str = ""
) -> Published:
    """The dry run: write what would be sent."""
    files = _with_card(parcel, card(parcel, repo_id, branch, license=license, family=family))
    write_out(files, folder)
    return Published(repo_id, branch, None, str(folder), tuple(files))


def tell(lines: Iterable[str], say: Callable[[str], None]) -> None:
    """Say every line once."""
    for line in dict.fromkeys(lines):
        say(f"  {line}")


def _with_card(parcel: Parcel, text: str) -> dict[str, Path | bytes]:
    refuse_secrets(text, CARD)
    return {**parcel.files, CARD: text.encode()}


def _verify(
    client: Client, order: Order, commit: str, say: Callable[[str], None]
) -> dict[str, float | None]:
    """Download a commit into an empty cache, compare bytes, load it both ways, compare outputs.

    Raises:
        PublishError: what came down is not what was published.
    """
    from huggingface_hub import constants, snapshot_download

    name, files = order.name, order.files
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
        model = from_pretrained(order.parcel.model)
        ways = ["hfprune", "stock" if order.parcel.is_stock else "remote-code"]
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
        how = f"outputs differ by {difference:g} at most" if difference else "the same outputs"
        say(f"Loaded by {WAYS[way]}: {'outputs not compared' if difference is None else how}")
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
