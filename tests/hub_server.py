"""A small server that speaks the read side of the Hub's API, for repositories that are local folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves folders on this machine, for as long as its context lasts.

    Args:
        repositories: the folder of each `owner/name`.
        keys: the token that opens a private repository; the others are public.
    """

    def __init__(self, repositories: Mapping[str, Path], keys: Mapping[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.keys = repositories, keys
        self.address = f"http://127.0.0.1:{self.server_port}"  # for HF_ENDPOINT
        self.requested: list[str] = []  # the path of every request so far

    def __enter__(self) -> HubServer:
        self.thread = Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers `api/models/R[/revision/REV]`, `api/models/R/tree/REV` and `R/resolve/REV/FILE`."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requested.append(path)
        owner, name, action, revision, *rest = (path.removeprefix("/api/models").strip("/") + "/" * 4).split("/")
        repository, file = f"{owner}/{name}", "/".join(rest).strip("/")
        folder, key = self.server.repositories.get(repository), self.server.keys.get(repository)
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.fail(401, "RepoNotFound", "Invalid username or password.")
        elif folder is None:
            self.fail(404, "RepoNotFound", "Repository not found")
        elif revision not in ("", "main", COMMIT):
            self.fail(404, "RevisionNotFound", "Invalid rev id")
        elif action != "resolve":
            self.send_listing(repository, folder, as_tree=action == "tree")
        elif (folder / file).is_file():
            self.send_file(folder / file)
        else:
            self.fail(404, "EntryNotFound", "Entry not found")

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def send_file(self, file: Path) -> None:
        body = file.read_bytes()
        self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def send_listing(self, repository: str, folder: Path, as_tree: bool) -> None:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        paths = [file.relative_to(folder).as_posix() for file in files]
        tree = [
            {"type": "file", "path": path, "size": file.stat().st_size, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path, file in zip(paths, files, strict=True)
        ]
        listing = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": path} for path in paths]}
        self.answer(200, json.dumps(tree if as_tree else listing).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str, message: str) -> None:
        self.answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""
