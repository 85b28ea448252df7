"""What the rehearsal's Hub keeps and how it answers: repositories with immutable commits, contents
named by their hash, and the part of the Hub's HTTP API that models need, without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_REGULAR_BYTES = 10_000_000  # larger files, and those with these endings, are large on the Hub
_LARGE = {".safetensors", ".bin", ".model", ".onnx", ".gguf", ".h5", ".pt", ".pth"}
_RELATIONS = {"finetune", "adapter", "merge", "quantized"}
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
        role: of the token: "write" or "read".
        organisations: {name: role in it: "write" or "read"}.
    """

    name: str
    role: str = "write"
    organisations: dict[str, str] = field(default_factory=dict)

    def may_write(self, owner: str) -> bool:
        """Whether the token may change what an owner has."""
        mine = owner == self.name or self.organisations.get(owner) == "write"
        return self.role == "write" and mine


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
    """

    endpoint = ""

    def __init__(self, folder: Path, users: dict[str, User]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.lock = threading.Lock()
        self.tickets: dict[str, str] = {}  # an upload's address is its permission, as on S3

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


@dataclass(frozen=True)
class Request:
    """What a route is called with: who asks, the query, the headers and the body."""

    store: Store
    user: User | None
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body or b"{}")

    def repo(self, name: str, *, write: bool = False, download: bool = False) -> Repo:
        """A repository that the user may read or write."""
        owner = name.split("/")[0]
        found = self.store.repos.get(name)
        mine = self.user is not None and (
            owner == self.user.name or owner in self.user.organisations
        )
        if found is None or (found.private and not mine):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if found.gated and download and not mine:
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted")
        if write and not (self.user and self.user.may_write(owner)):
            raise Refusal(403, "", "you don't have the rights to change this repository")
        return found


@dataclass(frozen=True)
class Answer:
    """Status, headers and body; a body that is no bytes is sent as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Route = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
_REPO = r"(?P<name>[^/]+/[^/]+)"


def _route(method: str, path: str) -> Callable[[Route], Route]:
    """Register what answers a method at a path; `{repo}` and `{word}` are passed on by name."""
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path.replace("{repo}", _REPO))

    def register(route: Route) -> Route:
        _ROUTES.append((method, re.compile(pattern.replace("{path:", "(?P<path>.+)")), route))
        return route

    return register


@_route("GET", "/api/whoami-v2")
def _whoami(request: Request) -> Answer:
    user = request.user
    if user is None:
        raise Refusal(401, "", "Invalid credentials in Authorization header")
    organisations = [
        {"type": "org", "name": name, "roleInOrg": role}
        for name, role in user.organisations.items()
    ]
    token = {"displayName": "a token", "role": user.role}
    return Answer(
        {
            "type": "user",
            "name": user.name,
            "orgs": organisations,
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


@_route("POST", "/api/repos/create")
def _create(request: Request) -> Answer:
    if request.user is None:
        raise Refusal(401, "", "Invalid credentials in Authorization header")
    asked = request.json
    owner = asked.get("organization") or request.user.name
    name = f"{owner}/{asked['name']}"
    if not request.user.may_write(owner):
        raise Refusal(403, "", f"you don't have the rights to create a model under {owner}")
    url = {"url": f"{request.store.endpoint}/{name}", "name": name}
    if name in request.store.repos:
        return Answer({**url, "error": "You already created this model repo"}, 409)
    private = asked.get("private") or asked.get("visibility") == "private"
    request.store.create(name, private=bool(private))
    return Answer(url)


@_route("POST", "/api/validate-yaml")
def _validate_card(request: Request) -> Answer:
    errors = []
    parts = request.json["content"].split("---\n")
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
    except yaml.YAMLError as error:
        metadata, errors = {}, [f"not YAML: {error}"]
    relation = metadata.get("base_model_relation", "finetune")
    if relation not in _RELATIONS:
        errors.append(f"base_model_relation must be one of {sorted(_RELATIONS)}")
    found = {"errors": [{"message": message} for message in errors], "warnings": []}
    return Answer(found, 400 if errors else 200)


@_route("GET", "/api/models/{repo}")
@_route("GET", "/api/models/{repo}/revision/{revision}")
def _info(request: Request, name: str, revision: str = "main") -> Answer:
    repo = request.repo(name)
    commit = repo.find(revision)
    files = sorted(repo.commits[commit].files)
    return Answer(
        {
            "id": name,
            "sha": commit,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files],
        }
    )


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry


@_route("GET", "/api/models/{repo}/tree/{revision}")
@_route("GET", "/api/models/{repo}/tree/{revision}/{path:")
def _tree(request: Request, name: str, revision: str, path: str = "") -> Answer:
    repo = request.repo(name)
    files = repo.commits[repo.find(revision)].files
    start = f"{path}/" if path else ""
    inside = {file: blob for file, blob in sorted(files.items()) if file.startswith(start)}
    if not inside:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist")
    if request.query.get("recursive", ["true"])[0].lower() == "true":
        return Answer([_entry(file, blob) for file, blob in inside.items()])
    deeper = {file[len(start) :].split("/")[0] for file in inside if "/" in file[len(start) :]}
    folders = [{"type": "directory", "path": start + d, "oid": "", "size": 0} for d in deeper]
    here = [_entry(f, blob) for f, blob in inside.items() if "/" not in f[len(start) :]]
    return Answer([*folders, *here])


@_route("POST", "/api/models/{repo}/paths-info/{revision}")
def _paths(request: Request, name: str, revision: str) -> Answer:
    repo = request.repo(name)
    files = repo.commits[repo.find(revision)].files
    asked = parse_qs(request.body.decode()).get("paths", [])
    return Answer([_entry(path, files[path]) for path in asked if path in files])


@_route("GET", "/api/models/{repo}/refs")
def _refs(request: Request, name: str) -> Answer:
    kinds: dict[str, list[dict[str, str]]] = {
        kind: [] for kind in ("branches", "converts", "tags", "pullRequests")
    }
    for ref, commit in request.repo(name).refs.items():
        kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
        short = ref.split("/", 2)[2]
        kinds[kind].append({"name": short, "ref": ref, "targetCommit": commit})
    return Answer(kinds)


@_route("POST", "/api/models/{repo}/branch/{branch}")
def _branch(request: Request, name: str, branch: str) -> Answer:
    repo = request.repo(name, write=True)
    if f"refs/heads/{branch}" in repo.refs:
        raise Refusal(409, "", "Reference already exists")
    repo.refs[f"refs/heads/{branch}"] = repo.find(request.json.get("startingPoint", "main"))
    return Answer({})


@_route("POST", "/api/models/{repo}/tag/{revision}")
def _tag(request: Request, name: str, revision: str) -> Answer:
    repo, tag = request.repo(name, write=True), request.json["tag"]
    if f"refs/tags/{tag}" in repo.refs:
        raise Refusal(409, "", "Tag reference exists already")
    repo.refs[f"refs/tags/{tag}"] = repo.find(revision)
    return Answer({})


@_route("POST", "/api/models/{repo}/preupload/{revision}")
def _preupload(request: Request, name: str, revision: str) -> Answer:
    repo = request.repo(name, write="create_pr" not in request.query)
    there = repo.commits[repo.find(revision)].files
    answers = []
    for file in request.json["files"]:
        path, size = file["path"], file["size"]
        large = size > _REGULAR_BYTES or Path(path).suffix in _LARGE
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": there[path].etag} if path in there else {}))
    return Answer({"files": answers})


@_route("POST", r"/{repo}\.git/info/lfs/objects/batch")
def _batch(request: Request, name: str) -> Answer:
    request.repo(name)
    store, objects = request.store, []
    for asked in request.json["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if not (store.folder / asked["oid"]).exists():
            ticket = secrets.token_hex(16)
            store.tickets[ticket] = asked["oid"]
            verify = f"{store.endpoint}/{name}.git/info/lfs/verify"
            entry["actions"] = {
                "upload": {"href": f"{store.endpoint}/storage/{ticket}"},
                "verify": {"href": verify},
            }
        objects.append(entry)
    return Answer({"transfer": "basic", "objects": objects})


@_route("PUT", "/storage/{ticket}")
def _upload(request: Request, ticket: str) -> Answer:
    wanted = request.store.tickets.get(ticket)
    if wanted is None:
        raise Refusal(403, "", "no such upload")
    if hashlib.sha256(request.body).hexdigest() != wanted:
        raise Refusal(400, "", "the content is not what its sha256 says")
    request.store.keep(request.body)
    return Answer(b"", headers={"ETag": f'"{wanted}"'})


@_route("POST", r"/{repo}\.git/info/lfs/verify")
def _verify(request: Request, name: str) -> Answer:
    path = request.store.folder / request.json["oid"]
    if not path.exists() or path.stat().st_size != request.json["size"]:
        raise Refusal(404, "", "the object is not here")
    return Answer({})


@_route("POST", "/api/models/{repo}/commit/{revision}")
def _commit(request: Request, name: str, revision: str) -> Answer:
    proposed = "create_pr" in request.query
    repo = request.repo(name, write=not proposed)
    header, *changes = [json.loads(line) for line in request.body.splitlines()]
    with request.store.lock:
        head = repo.find(revision)
        expected = header["value"].get("parentCommit")
        if expected not in (None, head):
            raise Refusal(412, "", "a commit has happened since; the parent is no longer the head")
        files = dict(repo.commits[head].files)
        for change in changes:
            _apply(request.store, files, change["key"], change["value"])
        ref, number = f"refs/heads/{revision}", 1 + sum("/pr/" in ref for ref in repo.refs)
        if proposed:
            ref = f"refs/pr/{number}"
        elif ref not in repo.refs:
            ref = revision  # refs/pr/N in full; a tag or a commit name cannot move
            if not ref.startswith("refs/pr/"):
                raise Refusal(400, "", f"{revision} is no branch")
        made = repo.add(ref, Commit(header["value"]["summary"], head, files))
    url = f"{request.store.endpoint}/{name}"
    answer = {"success": True, "commitOid": made, "commitUrl": f"{url}/commit/{made}"}
    return Answer(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if proposed else {}))


def _apply(store: Store, files: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
    path = value["path"]
    match kind:
        case "file":
            files[path] = store.keep(base64.b64decode(value["content"]))
        case "lfsFile":
            stored = store.folder / value["oid"]
            if not stored.exists():
                raise Refusal(400, "", f"{path}: its content was not uploaded")
            files[path] = store.keep(stored.read_bytes(), large=True)
        case "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(400, "", f"{path} is not there to be deleted")
        case _:
            raise Refusal(400, "", f"unknown operation {kind}")


@_route("GET", "/{repo}/resolve/{revision}/{path:")
def _resolve(request: Request, name: str, revision: str, path: str) -> Answer:
    repo = request.repo(name, download=True)
    commit = repo.find(revision)
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    blob = repo.commits[commit].files.get(path)
    if blob is None:
        code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Answer(b"Entry not found", 404, headers | code)
    headers["ETag"] = f'"{blob.etag}"'
    content = request.store.content(blob)
    ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not ranged:
        return Answer(content, 200, headers)
    start, end = int(ranged[1]), int(ranged[2] or blob.size - 1)
    if start >= blob.size:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
    return Answer(content[start : end + 1], 206, headers)


def respond(
    store: Store, method: str, path: str, headers: Mapping[str, str], body: bytes
) -> Answer:
    """Answer one request; refusals are answers too."""
    if path.startswith(("/datasets/", "/api/datasets/")):  # kept among the models
        path = path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
    address = urlsplit(path)
    token = headers.get("Authorization", "").removeprefix("Bearer ")
    query = parse_qs(address.query, keep_blank_values=True)
    try:
        if token and token not in store.users:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        request = Request(store, store.users.get(token), query, headers, body)
        for wanted, pattern, route in _ROUTES:
            found = pattern.fullmatch(address.path)
            if found and wanted == method:
                return route(request, **{k: unquote(v) for k, v in found.groupdict().items()})
        raise Refusal(404, "", f"this Hub has no {method} {address.path}")
    except Refusal as no:
        code = {"X-Error-Code": no.code} if no.code else {}
        return Answer({"error": str(no)}, no.status, code | {"X-Error-Message": str(no)})
