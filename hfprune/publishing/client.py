"""The Hub as one token sees it: what is there, what may be done, and the commit that does it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hfprune.errors import HfpruneError, PublishError
from hfprune.files import sha256_of
from hfprune.publishing.card import base_of
from hfprune.publishing.page import FIGURES
from hfprune.publishing.parcel import CARD, OURS, Parcel

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True)
class There:
    """What is at the target before: {path: etag} and the card, of a commit; private or not."""

    head: str | None = None
    private: bool | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    card: str = ""
    is_new_branch: bool = False


@contextmanager
def told(doing: str) -> Iterator[None]:
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


def check_name(repo_id: str) -> None:
    """Refuse what is no name of a repository, before anything is made of it.

    Raises:
        PublishError: says what is wrong with it.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} names no repository: {error} Give owner/name.") from error


class Client:
    """The Hub, as one token sees it."""

    def __init__(self, token: str | None) -> None:
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

    def target(self, repo_id: str, create_pr: bool) -> str:
        """The full name of the repository, if the token may write there."""
        account = self._account
        token = account.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
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
        if not create_pr and token.get("role") == "fineGrained":
            _refuse_narrow(token, owner, name)
        return f"{owner}/{name}"

    @cached_property
    def _account(self) -> dict[str, Any]:
        """Who the token stands for; the Hub does not like to be asked often."""
        try:
            return self.api.whoami(token=self.token)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 401:
                raise PublishError(
                    "The Hub does not know this token. Log in again with `hf auth login`, or set"
                    " HF_TOKEN to a token that may write."
                ) from error
            raise

    def look(self, name: str, branch: str, create_pr: bool) -> There:
        """What is at the target now."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        is_new = False
        try:
            info = self.api.model_info(name, revision=branch)
        except RepositoryNotFoundError:
            if create_pr:
                raise PublishError(f"There is no {name} to propose anything to.") from None
            return There()
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
        return There(info.sha, info.private, files, text, is_new)

    def _tree(self, name: str, commit: str) -> dict[str, str]:
        """{path: git's name of the content, or sha256 of a large one} of a commit."""
        from huggingface_hub import RepoFile

        entries = self.api.list_repo_tree(name, recursive=True, revision=commit)
        return {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def refuse_strangers(self, name: str, branch: str, there: There, known: str | None) -> None:
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
    ) -> tuple[dict[str, Any], list[str]]:
        """What the base model's card says, and warnings.

        Raises:
            PublishError: the base is gated or private, the result would be public, and nobody has
                said that it should.
        """
        base = base_of(parcel)
        if base is None:
            return {}, [
                "The base model did not come from the Hub: the card names it only if you write"
                " `base_model` into its metadata."
            ]
        try:
            info = self.api.model_info(base[0], revision=base[1])
        except Exception as error:
            return {}, [_unread(base[0], error)]
        restricted = "private" if info.private else "gated" if info.gated else ""
        if restricted and private is None and not is_private:
            raise PublishError(
                f"The base model {base[0]} is {restricted}, and the pruned one would be public. See"
                " whether its license allows that, then say private=True or private=False"
                " (--private or --public)."
            )
        from huggingface_hub import ModelCard

        try:
            data = ModelCard.load(base[0], token=self.token, ignore_metadata_errors=True).data
        except Exception as error:
            return {}, [_unread(base[0], error)]
        return {k: v for k, v in data.to_dict().items() if k in _INHERITED}, []

    def upload(
        self,
        name: str,
        branch: str,
        files: Mapping[str, Path | bytes],
        gone: list[str],
        there: There,
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

    def gather(self, repo_id: str, models: Iterable[str], private: bool | None) -> str:
        """Put models into a collection that is called as a repository would be; its address."""
        owner, _, title = self.target(repo_id, False).rpartition("/")
        made = self.api.create_collection(
            title, namespace=owner, private=bool(private), exists_ok=True
        )
        for model in models:
            self.api.add_collection_item(made.slug, model, "model", exists_ok=True)
        return made.url


def _refuse_narrow(token: Mapping[str, Any], owner: str, name: str) -> None:
    """Refuse a fine-grained token whose scopes leave out writing to a repository."""
    scopes = token.get("fineGrained", {}).get("scoped", [])
    writable = {s["entity"].get("name") for s in scopes if "repo.write" in s["permissions"]}
    if not writable & {owner, f"{owner}/{name}"}:
        raise PublishError(
            f"The token is fine-grained and may not write to {owner}/{name}. Let it write to the"
            f" repositories of {owner} at https://huggingface.co/settings/tokens."
        )


def _unread(base: str, error: Exception) -> str:
    """A warning: the base model is not ours, and without its card the new one only says less."""
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"The card of {base} could not be read ({why}): license, language and data sets are not"
        " taken over from it."
    )


def left_over(there: Mapping[str, str], files: Mapping[str, Path | bytes]) -> list[str]:
    """Files of an earlier model that would be taken for parts of this one."""
    return [
        path
        for path in there
        if path not in files
        and (
            path in OURS
            or path.startswith(f"{FIGURES}/")
            or ("/" not in path and path.endswith((".safetensors", ".safetensors.index.json")))
        )
    ]


def digest(file: Path | bytes, kind: str) -> str:
    """The sha256 of a content, or git's name of it ("git")."""
    if kind == "sha256" and isinstance(file, Path):
        return sha256_of(file)
    content = file if isinstance(file, bytes) else file.read_bytes()
    if kind == "sha256":
        return hashlib.sha256(content).hexdigest()
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def same(file: Path | bytes, etag: str | None) -> bool:
    """Whether a file is what the Hub has, by sha256 or by git's name of its content."""
    return etag is not None and etag == digest(file, "sha256" if len(etag) == 64 else "git")
