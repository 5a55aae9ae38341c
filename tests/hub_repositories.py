"""What a Hub keeps: repositories with commits, branches and tags, large files by their digest, and faults on order."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LARGE = (".safetensors",)  # what .gitattributes gives to LFS
SILENCE, CUT = "silence", "cut"  # no answer at all; a connection that ends in the middle of a body


def sha256(content: bytes) -> str:
    """The name of a large file."""
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    """The name of a small file, as git gives it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    """Whether a file is to be sent to the store of large files."""
    return path.endswith(LARGE)


@dataclass(frozen=True)
class Commit:
    """A state of all files.

    Args:
        oid: its name.
        files: path -> content.
        message: its first line.
    """

    oid: str
    files: Mapping[str, bytes]
    message: str


@dataclass
class Repository:
    """One repository.

    Args:
        name: `owner/name`.
        private: whether only its owner and its key may read it.
        gated: whether only its owner may read its files, though all may see that they are there.
        key: a token that opens it.
        commits: by their name, oldest first.
        branches, tags: name -> the name of a commit.
    """

    name: str
    private: bool = False
    gated: bool = False
    key: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: Mapping[str, bytes], message: str, gone: Sequence[str] = ()) -> Commit:
        """A commit of these files on top of a branch, without those that are gone; folders end with a slash."""
        found = self.at(branch)
        folders = tuple(name for name in gone if name.endswith("/"))
        kept = (name for name in (found.files if found else ()) if name not in gone and not name.startswith(folders))
        before = {name: found.files[name] for name in kept} if found else {}
        text = f"{self.name} {len(self.commits)} {branch} {message}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), {**before, **files}, message)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit's name means."""
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def describe(self, commit: Commit) -> dict:
        """As `model_info` wants it."""
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {"id": self.name, "sha": commit.oid, "private": self.private, "gated": self.gated, "siblings": siblings}

    def references(self) -> dict[str, list[dict[str, str]]]:
        """As `list_repo_refs` wants them."""
        kinds = {"branches": ("heads", self.branches), "tags": ("tags", self.tags), "converts": ("convert", {})}
        return {
            kind: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": oid} for name, oid in named.items()]
            for kind, (place, named) in kinds.items()
        }


def as_entry(path: str, content: bytes) -> dict:
    """A file as a listing of it says."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if is_large(path):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def as_upload(file: Mapping, commit: Commit) -> dict:
    """How a file is to be sent, and what is there under its name."""
    path = file["path"]
    before = commit.files.get(path)
    known = None if before is None else sha256(before) if is_large(path) else git_hash(before)
    return {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False, "oid": known}


def sent_files(body: bytes, store: Mapping[str, bytes]) -> tuple[str, dict[str, bytes], list[str]]:
    """A commit's message, files and what it removes, from the lines in which it was sent; the store has large ones.

    Raises:
        KeyError: if a large file never arrived.
    """
    message, files, gone = "", {}, []
    for line in body.decode().splitlines():
        item = json.loads(line)
        kind, value = item["key"], item["value"]
        if kind == "header":
            message = value["summary"]
        elif kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            files[value["path"]] = store[value["oid"]]
        elif kind in ("deletedFile", "deletedFolder"):
            gone.append(value["path"].rstrip("/") + ("/" if kind == "deletedFolder" else ""))
    return message, files, gone


@dataclass
class Fault:
    """What goes wrong on order.

    Args:
        pattern: is looked for in `METHOD /path`.
        kind: a status, `SILENCE` or `CUT`.
        times: how often it still happens.
    """

    pattern: str
    kind: int | str
    times: int

    def meets(self, request: str) -> bool:
        """Whether it happens to this request; counts down."""
        if self.times == 0 or not re.search(self.pattern, request):
            return False
        self.times -= 1
        return True


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a local folder, as a first commit has them."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
