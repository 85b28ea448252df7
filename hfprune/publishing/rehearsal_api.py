"""How the rehearsal's Hub answers: the part of the Hub's HTTP API that models and collections need,
without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml

from hfprune.publishing.rehearsal_routing import Answer, Request, Routes
from hfprune.publishing.rehearsal_store import (
    Blob,
    Collection,
    Commit,
    Refusal,
    Store,
    Upload,
)

_REGULAR_BYTES = 10_000_000  # larger files, and those with these endings, are large on the Hub
_LARGE = {".safetensors", ".bin", ".model", ".onnx", ".gguf", ".h5", ".pt", ".pth"}
_RELATIONS = {"finetune", "adapter", "merge", "quantized"}

HUB = Routes()
"""What the Hub answers."""


@HUB.at("GET", "/api/whoami-v2")
def _whoami(request: Request) -> Answer:
    user = request.user
    if user is None:
        raise Refusal(401, "", "Invalid credentials in Authorization header")
    organisations = [
        {"type": "org", "name": name, "roleInOrg": role}
        for name, role in user.organisations.items()
    ]
    token: dict[str, Any] = {"displayName": "a token", "role": user.role}
    if user.role == "fineGrained":
        scoped = [
            {"entity": {"type": "user", "name": owner}, "permissions": permissions}
            for owner, permissions in user.scopes.items()
        ]
        token["fineGrained"] = {"global": [], "scoped": scoped}
    return Answer(
        {
            "type": "user",
            "name": user.name,
            "orgs": organisations,
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


@HUB.at("POST", "/api/repos/create")
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


@HUB.at("POST", "/api/validate-yaml")
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


@HUB.at("GET", "/api/models/{repo}")
@HUB.at("GET", "/api/models/{repo}/revision/{revision}")
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


@HUB.at("GET", "/api/models/{repo}/tree/{revision}")
@HUB.at("GET", "/api/models/{repo}/tree/{revision}/{path:")
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


@HUB.at("POST", "/api/models/{repo}/paths-info/{revision}")
def _paths(request: Request, name: str, revision: str) -> Answer:
    repo = request.repo(name)
    files = repo.commits[repo.find(revision)].files
    asked = parse_qs(request.body.decode()).get("paths", [])
    return Answer([_entry(path, files[path]) for path in asked if path in files])


@HUB.at("GET", "/api/models/{repo}/refs")
def _refs(request: Request, name: str) -> Answer:
    kinds: dict[str, list[dict[str, str]]] = {
        kind: [] for kind in ("branches", "converts", "tags", "pullRequests")
    }
    for ref, commit in request.repo(name).refs.items():
        kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
        short = ref.split("/", 2)[2]
        kinds[kind].append({"name": short, "ref": ref, "targetCommit": commit})
    return Answer(kinds)


@HUB.at("POST", "/api/models/{repo}/branch/{branch}")
def _branch(request: Request, name: str, branch: str) -> Answer:
    repo = request.repo(name, write=True)
    if f"refs/heads/{branch}" in repo.refs:
        raise Refusal(409, "", "Reference already exists")
    repo.refs[f"refs/heads/{branch}"] = repo.find(request.json.get("startingPoint", "main"))
    return Answer({})


@HUB.at("POST", "/api/models/{repo}/tag/{revision}")
def _tag(request: Request, name: str, revision: str) -> Answer:
    repo, tag = request.repo(name, write=True), request.json["tag"]
    if f"refs/tags/{tag}" in repo.refs:
        raise Refusal(409, "", "Tag reference exists already")
    repo.refs[f"refs/tags/{tag}"] = repo.find(revision)
    return Answer({})


@HUB.at("POST", "/api/models/{repo}/preupload/{revision}")
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


@HUB.at("POST", r"/{repo}\.git/info/lfs/objects/batch")
def _batch(request: Request, name: str) -> Answer:
    request.repo(name)
    store, objects = request.store, []
    for asked in request.json["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if not store.has(asked["oid"]):
            verify = {"href": f"{store.endpoint}/{name}.git/info/lfs/verify"}
            entry["actions"] = {"upload": _way_in(store, **entry), "verify": verify}
        objects.append(entry)
    return Answer({"transfer": "basic", "objects": objects})


def _way_in(store: Store, oid: str, size: int) -> dict[str, Any]:
    """Where a content is sent to; a large one in parts, whose addresses stand in the header."""
    ticket = secrets.token_hex(16)
    store.uploads[ticket] = Upload(oid)
    address = f"{store.endpoint}/storage/{ticket}"
    if size <= store.part_bytes:
        return {"href": address}
    count = -(-size // store.part_bytes)
    parts = {f"{number:05}": f"{address}/{number}" for number in range(1, count + 1)}
    return {"href": address, "header": {"chunk_size": str(store.part_bytes), **parts}}


def _upload_of(request: Request, ticket: str) -> Upload:
    if ticket not in request.store.uploads:
        raise Refusal(403, "", "no such upload")
    return request.store.uploads[ticket]


@HUB.at("PUT", "/storage/{ticket}")
def _put(request: Request, ticket: str) -> Answer:
    request.store.take(_upload_of(request, ticket), request.body)
    return Answer(b"")


@HUB.at("PUT", "/storage/{ticket}/{part}")
def _put_part(request: Request, ticket: str, part: str) -> Answer:
    _upload_of(request, ticket).parts[int(part)] = request.body
    return Answer(b"", headers={"ETag": f'"{_etag(request.body)}"'})


@HUB.at("POST", "/storage/{ticket}")
def _complete(request: Request, ticket: str) -> Answer:
    upload, content = _upload_of(request, ticket), b""
    for said in request.json["parts"]:
        part = upload.parts.get(said["partNumber"])
        if part is None or said["etag"].strip('"') != _etag(part):
            raise Refusal(400, "", f"part {said['partNumber']} has not arrived")
        content += part
    request.store.take(upload, content)
    return Answer({})


def _etag(part: bytes) -> str:
    return hashlib.md5(part, usedforsecurity=False).hexdigest()


@HUB.at("POST", r"/{repo}\.git/info/lfs/verify")
def _verify(request: Request, name: str) -> Answer:
    path = request.store.folder / request.json["oid"]
    if not path.exists() or path.stat().st_size != request.json["size"]:
        raise Refusal(404, "", "the object is not here")
    return Answer({})


@HUB.at("POST", "/api/models/{repo}/commit/{revision}")
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
            if not store.has(value["oid"]):
                raise Refusal(400, "", f"{path}: its content was not uploaded")
            content = (store.folder / value["oid"]).read_bytes()
            files[path] = store.keep(content, large=True)
        case "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(400, "", f"{path} is not there to be deleted")
        case _:
            raise Refusal(400, "", f"unknown operation {kind}")


@HUB.at("GET", "/{repo}/resolve/{revision}/{path:")
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


def _told(store: Store, slug: str, found: Collection) -> Answer:
    """A collection as the Hub tells of it."""
    items = [
        {"_id": model, "id": model, "type": "model", "position": place}
        for place, model in enumerate(found.models)
    ]
    seen = {"slug": slug, "title": found.title, "owner": {"name": found.owner}, "items": items}
    rest = {"lastUpdated": "2000-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
    return Answer({**seen, **rest, "private": found.private})


def _collection(request: Request, slug: str, *, write: bool = False) -> Collection:
    found, user = request.store.collections.get(slug), request.user
    if found is None or (found.private and not (user and user.sees(found.owner))):
        raise Refusal(404, "", "Collection not found")
    if write and not (user and user.may_write(found.owner)):
        raise Refusal(403, "", "you don't have the rights to change this collection")
    return found


@HUB.at("POST", "/api/collections")
def _create_collection(request: Request) -> Answer:
    asked, store = request.json, request.store
    title, owner = asked["title"], asked["namespace"]
    if not (request.user and request.user.may_write(owner)):
        raise Refusal(403, "", f"you don't have the rights to create a collection under {owner}")
    slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{_etag(title.encode())[:24]}"
    if slug in store.collections:
        return Answer({"slug": slug, "error": "it is there already"}, 409)
    made = store.collections[slug] = Collection(title, owner, bool(asked.get("private")))
    return _told(store, slug, made)


@HUB.at("GET", "/api/collections/{repo}")
def _get_collection(request: Request, name: str) -> Answer:
    return _told(request.store, name, _collection(request, name))


@HUB.at("POST", "/api/collections/{repo}/items")
def _add_to_collection(request: Request, name: str) -> Answer:
    found, item = _collection(request, name, write=True), request.json["item"]
    if item["type"] != "model":
        raise Refusal(400, "", "this Hub has models only")
    request.repo(item["id"])
    if item["id"] in found.models:
        raise Refusal(409, "", "it is in the collection already")
    found.models.append(item["id"])
    return _told(request.store, name, found)
