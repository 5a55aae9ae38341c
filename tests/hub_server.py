"""A small server that speaks the Hub's API over HTTP, with tokens and with faults on order."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from urllib.parse import unquote, urlsplit

from hub_api import ROUTES, HubApi, Refusal
from hub_repositories import CUT, SILENCE, Fault, Repository, read_folder

FOREIGN = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_ASSETS_CACHE", "HF_TOKEN")


def visitor_environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that may go to a Hub on this machine, with caches of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    tests = Path(__file__).parent
    return kept | {
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
        **more,
    }


class HubServer(ThreadingHTTPServer):
    """A Hub on this machine, for as long as its context lasts.

    Args:
        folders: the local folder of each `owner/name` that is there from the start.
        keys: the token that opens a private repository; the others are public.
        users: token -> the name of a user, who may write what is under it.
        readers: those of the tokens that may not write.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        keys: Mapping[str, str],
        users: Mapping[str, str] | None = None,
        readers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users, self.readers = dict(users or {}), readers
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256
        self.faults: list[Fault] = []
        self.log: list[str] = []  # `METHOD /path` of every request so far
        self.sent: Counter[str] = Counter()  # bytes of the answers, by the path that was asked for
        self.closing = Event()
        self.address = f"http://127.0.0.1:{self.server_port}"  # for HF_ENDPOINT
        for name, folder in folders.items():
            self.make(name, private=name in keys, key=keys.get(name)).add("main", read_folder(folder), "the first")

    @property
    def requested(self) -> list[str]:
        """The path of every request so far."""
        return [line.split(" ", 1)[1] for line in self.log]

    def make(self, name: str, **options: bool | str | None) -> Repository:
        """A new repository, as yet without a commit."""
        return self.repositories.setdefault(name, Repository(name, **options))  # type: ignore[arg-type]

    def fail(self, pattern: str, kind: int | str, times: int = 1) -> None:
        """Orders a fault for the next requests `METHOD /path` that match; takes back those ordered before."""
        self.faults = [Fault(pattern, kind, times)]

    def __enter__(self) -> HubServer:
        self.thread = Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(HubApi):
    """Reads a request, lets happen what was ordered, and hands it to its route."""

    def do_GET(self) -> None:  # noqa: N802 - the base class looks for this name
        request = f"{self.command} {urlsplit(self.path).path}"
        self.server.log.append(unquote(request))
        fault = next((fault for fault in self.server.faults if fault.meets(unquote(request))), None)
        self.cut = fault is not None and fault.kind == CUT
        if fault is not None and fault.kind == SILENCE:
            self.server.closing.wait(30)
            self.close_connection = True
            return
        try:
            self.body = self.read_body()
            if fault is not None and isinstance(fault.kind, int):
                raise Refusal(fault.kind, "", "This was ordered.")
            self.route(request)
        except Refusal as refusal:
            status, code, message = refusal.args
            body = json.dumps({"error": message}).encode()
            self.answer(status, body, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - and for these

    def read_body(self) -> bytes:
        """What was sent, in one piece or in chunks; half of it where the connection is to be cut."""
        length = int(self.headers.get("Content-Length", 0))
        if self.cut and self.command == "PUT":
            self.rfile.read(length // 2)
            raise ConnectionError("ordered")
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def route(self, request: str) -> None:
        for pattern, name in ROUTES.items():
            if found := re.fullmatch(pattern, request):
                getattr(self, name)(**{key: unquote(value) for key, value in found.groupdict().items()})
                return
        raise Refusal(404, "", f"No such route: {request}")
