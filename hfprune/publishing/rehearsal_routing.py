"""Requests to the rehearsal's Hub, their answers, and which function gives which."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hfprune.publishing.rehearsal_store import Refusal, Repo, Store, User

_REPO = r"(?P<name>[^/]+/[^/]+)"


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
        mine = self.user is not None and self.user.sees(owner)
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


class Routes:
    """What answers a method at a path."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Route]] = []

    def at(self, method: str, path: str) -> Callable[[Route], Route]:
        """Register what answers; `{repo}` is passed on as `name`, and `{word}` by its own name."""
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path.replace("{repo}", _REPO))
        compiled = re.compile(pattern.replace("{path:", "(?P<path>.+)"))

        def register(route: Route) -> Route:
            self._routes.append((method, compiled, route))
            return route

        return register

    def respond(
        self, store: Store, method: str, path: str, headers: Mapping[str, str], body: bytes
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
            for wanted, pattern, route in self._routes:
                found = pattern.fullmatch(address.path)
                if found and wanted == method:
                    return route(request, **{k: unquote(v) for k, v in found.groupdict().items()})
            raise Refusal(404, "", f"this Hub has no {method} {address.path}")
        except Refusal as no:
            code = {"X-Error-Code": no.code} if no.code else {}
            return Answer({"error": str(no)}, no.status, code | {"X-Error-Message": str(no)})
