"""What a Hub answers to each request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from hub_repositories import Commit, Repository, as_entry, as_upload, git_hash, is_large, sent_files, sha256

if TYPE_CHECKING:
    from hub_server import HubServer

REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
# A Space may have the name of a model, so that here its name begins with `spaces/`.
MODEL = r"/api/(?:(?:models|datasets)/|(?=spaces/))(?P<repository>(?:spaces/)?[^/]+/[^/]+)"
# Method and path -> the handler's method; the groups are its arguments, unquoted.
ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"GET {MODEL}": "describe",
    rf"GET {MODEL}/revision/(?P<revision>[^/]+)": "describe",
    rf"GET {MODEL}/refs": "references",
    rf"GET {MODEL}/tree/(?P<revision>[^/]+)(/.*)?": "tree",
    rf"POST {MODEL}/paths-info/(?P<revision>[^/]+)": "paths",
    rf"POST {MODEL}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"POST {MODEL}/commit/(?P<revision>[^/]+)": "commit",
    rf"POST {MODEL}/branch/(?P<name>[^/]+)": "branch",
    rf"POST {MODEL}/tag/(?P<revision>[^/]+)": "tag",
    rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch": "batch",
    r"PUT /large-files/(?P<oid>\w+)": "store",
    rf"(GET|HEAD) /(?:datasets/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}


class Refusal(Exception):  # noqa: N818 - not an error of ours
    """An answer that is an error: status, the Hub's code for it, and a sentence."""


class HubApi(BaseHTTPRequestHandler):
    """The actions of `ROUTES`, each of which answers or raises a `Refusal`.

    A handler sets `body` to what was sent, and `cut` where only half of the answer is to go out.
    """

    protocol_version = "HTTP/1.1"
    server: HubServer
    body: bytes
    cut: bool

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def user(self) -> str | None:
        return self.server.users.get(self.token)

    def readable(self, name: str) -> Repository:
        """The repository, if this token may see it."""
        repository = self.server.repositories.get(name)
        owns = repository is not None and self.user == name.split("/")[-2]
        if repository is not None and repository.private and not owns and self.token != repository.key:
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if repository is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repository

    def check_writer(self, owner: str) -> None:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if self.user != owner or self.token in self.server.readers:
            raise Refusal(403, "", f"You don't have the rights to write under {owner}")

    def writable(self, name: str) -> Repository:
        self.check_writer(name.split("/")[-2])
        return self.readable(name)

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        self.answer_json({"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        self.check_writer(owner)
        if wanted.get("type") == "space" and wanted.get("sdk") != "gradio":
            raise Refusal(400, "", "A Space needs an SDK")
        name = f"{'spaces/' if wanted.get('type') == 'space' else ''}{owner}/{wanted['name']}"
        url = {"url": f"{self.server.address}/{name}", "name": name}
        if name in self.server.repositories:
            self.answer_json({"error": "You already created this model repo", **url}, 409)
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.make(name, private=private).add("main", {".gitattributes": b""}, "initial commit")
        self.answer_json(url)

    def validate(self) -> None:
        self.answer_json({"errors": [], "warnings": []})

    def describe(self, repository: str, revision: str = "main") -> None:
        found = self.readable(repository)
        self.answer_json(found.describe(self.commit_of(found, revision)))

    def references(self, repository: str) -> None:
        self.answer_json(self.readable(repository).references())

    def tree(self, repository: str, revision: str) -> None:
        files = self.commit_of(self.readable(repository), revision).files
        self.answer_json([as_entry(path, content) for path, content in sorted(files.items())])

    def paths(self, repository: str, revision: str) -> None:
        files, wanted = self.commit_of(self.readable(repository), revision).files, parse_qs(self.body.decode())["paths"]
        self.answer_json([as_entry(path, files[path]) for path in wanted if path in files])

    def preupload(self, repository: str, revision: str) -> None:
        commit = self.commit_of(self.writable(repository), revision)
        self.answer_json({"files": [as_upload(file, commit) for file in json.loads(self.body)["files"]]})

    def batch(self, repository: str) -> None:
        self.writable(repository)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.server.large_files:
                wanted["actions"] = {"upload": {"href": f"{self.server.address}/large-files/{wanted['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if sha256(self.body) != oid:
            raise Refusal(400, "", "The content is another than was announced.")
        self.server.large_files[oid] = self.body
        self.answer(200, b"", {})

    def commit(self, repository: str, revision: str) -> None:
        found = self.writable(repository)
        self.commit_of(found, revision)
        message, files, gone = sent_files(self.body, self.server.large_files)
        oid = found.add(revision, files, message, gone).oid
        self.answer_json({"commitUrl": f"{self.server.address}/{repository}/commit/{oid}", "commitOid": oid})

    def branch(self, repository: str, name: str) -> None:
        found = self.writable(repository)
        if name in found.branches:
            raise Refusal(409, "", f"Reference already exists: refs/heads/{name}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        found.branches[name] = self.commit_of(found, start).oid
        self.answer_json({})

    def tag(self, repository: str, revision: str) -> None:
        found, name = self.writable(repository), json.loads(self.body)["tag"]
        if name in found.tags:
            raise Refusal(409, "", f"Tag reference exists already: refs/tags/{name}")
        found.tags[name] = self.commit_of(found, revision).oid
        self.answer_json({})

    def resolve(self, repository: str, revision: str, path: str) -> None:
        found = self.readable(repository)
        if found.gated and self.user != repository.split("/")[0]:
            raise Refusal(403, "GatedRepo", f"Access to model {repository} is restricted.")
        commit = self.commit_of(found, revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        body = commit.files[path]
        headers = {"ETag": f'"{sha256(body) if is_large(path) else git_hash(body)}"', "X-Repo-Commit": commit.oid}
        part = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.answer(200, body, headers)
            return
        first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        self.answer(206, body[first : last + 1], headers)

    def answer_json(self, what: object, status: int = 200) -> None:
        self.answer(status, json.dumps(what).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent[urlsplit(self.path).path] += len(body)
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        self.close_connection = self.close_connection or self.cut

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""
