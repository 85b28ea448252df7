"""What the rehearsal's Hub keeps: repositories with immutable commits, contents named by their
hash, collections, and who may do what.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path

_GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Blob:
    """The content of one file.

    Attributes:
        sha256: hash of the content, under which it is stored.
        oid: git's name of the content.
        size: in bytes.
        large: whether the Hub keeps it in its large file storage.
    """

    sha256: str
    oid: str
    size: int
    large: bool

    @property
    def etag(self) -> str:
        """What the client takes for the content's name: sha256 if large, else git's."""
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    """One revision, which never changes: a title, a parent ("" for the first) and the files."""

    title: str
    parent: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A model repository.

    Attributes:
        private: only its owner sees it.
        gated: only its owner downloads from it.
        commits: by name.
        refs: {"refs/heads/main": commit name, ...}.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str:
        """Name of the commit that a branch, tag, ref or commit name means."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        if revision in self.commits:
            return revision
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(self, ref: str, commit: Commit) -> str:
        """Store a commit and move a ref to it."""
        tree = {path: blob.sha256 for path, blob in sorted(commit.files.items())}
        text = json.dumps([commit.title, commit.parent, tree, len(self.commits)])
        name = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[name] = commit
        self.refs[ref] = name
        return name


@dataclass(frozen=True)
class User:
    """Who a token stands for.

    Attributes:
        name: of the user.
        role: of the token: "write", "read" or "fineGrained".
        organisations: {name: role in it: "write" or "read"}.
        scopes: {owner: what a fine-grained token may do there}.
    """

    name: str
    role: str = "write"
    organisations: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, list[str]] = field(default_factory=dict)

    def sees(self, owner: str) -> bool:
        """Whether the token may see what an owner keeps private."""
        return owner == self.name or owner in self.organisations

    def may_write(self, owner: str) -> bool:
        """Whether the token may change what an owner has."""
        mine = owner == self.name or self.organisations.get(owner) == "write"
        return mine and (self.role == "write" or "repo.write" in self.scopes.get(owner, []))


@dataclass
class Collection:
    """Models that belong together.

    Attributes:
        title: what its owner calls it.
        owner: user or organisation.
        private: only its owner sees it.
        models: the repositories in it, in order.
    """

    title: str
    owner: str
    private: bool
    models: list[str] = field(default_factory=list)


@dataclass
class Upload:
    """A content that is on its way.

    Attributes:
        sha256: what its hash must be.
        parts: those that have arrived, by number; {} for one that comes in one piece.
    """

    sha256: str
    parts: dict[int, bytes] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that says no: status, the Hub's error code, and a sentence."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Store:
    """Everything that the Hub knows.

    Args:
        folder: where the contents are kept.
        users: {token: who it stands for}.

    Attributes:
        part_bytes: larger contents are asked for in parts of this size.
        repos: by name.
        collections: by slug.
        uploads: by ticket; an upload's address is its permission, as on S3.
    """

    endpoint = ""

    def __init__(self, folder: Path, users: dict[str, User]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.users = users
        self.part_bytes = 5_000_000
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, Collection] = {}
        self.uploads: dict[str, Upload] = {}
        self.lock = threading.Lock()

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repo:
        """Make a repository with its first commit."""
        repo = self.repos[name] = Repo(private, gated)
        files = {".gitattributes": self.keep(_GITATTRIBUTES)}
        repo.add("refs/heads/main", Commit("initial commit", "", files))
        return repo

    def keep(self, content: bytes, *, large: bool = False) -> Blob:
        """Store a content under its hash."""
        name = hashlib.sha256(content).hexdigest()
        path = self.folder / name
        if not path.exists():
            temporary = path.with_suffix(f".{secrets.token_hex(4)}")
            temporary.write_bytes(content)
            temporary.replace(path)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return Blob(name, git.hexdigest(), len(content), large)

    def has(self, sha256: str) -> bool:
        """Whether a content is here."""
        return (self.folder / sha256).exists()

    def take(self, upload: Upload, content: bytes) -> None:
        """Store an uploaded content, if it is what its hash says."""
        if hashlib.sha256(content).hexdigest() != upload.sha256:
            raise Refusal(400, "", "the content is not what its sha256 says")
        self.keep(content)

    def content(self, blob: Blob) -> bytes:
        """What a blob holds."""
        return (self.folder / blob.sha256).read_bytes()

    def put(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files to a repository from outside, as another person's push would."""
        repo, ref = self.repos[name], f"refs/heads/{branch}"
        parent = repo.refs[ref]
        added = {path: self.keep(content) for path, content in files.items()}
        merged = {**repo.commits[parent].files, **added}
        return repo.add(ref, Commit("a commit from elsewhere", parent, merged))
