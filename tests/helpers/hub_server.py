# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A Hugging Face Hub in memory, on a free port of 127.0.0.1, for tests with the unmodified `huggingface_hub` client.

It knows what pushing and loading models needs: commits with regular and LFS files, branches, downloads by branch or
sha, error codes; no Xet, tags, pull requests, datasets. The same pushes in the same order always give the same shas.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


USER = "user"
LFS_SUFFIXES = (".bin", ".pt", ".safetensors")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """Status, message and code of an error response; the client chooses its exception by status and code."""


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files of a repo, by path."""

    sha: str
    title: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A branch is the list of its commits, oldest first."""

    repo_id: str
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def log(self, revision: str) -> list[Commit]:
        """The commits up to `revision`, which is a branch or a sha."""
        for branch, commits in self.branches.items():
            for length in range(len(commits), 0, -1):
                if revision in (branch, commits[length - 1].sha):
                    return commits[:length]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, title: str, message: str, files: dict[str, bytes]) -> str:
        history = self.branches.setdefault(branch, [])
        parents = [commit.sha for commit in history[-1:]]
        ids = sorted((path, oid_of(path, content)) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([self.repo_id, parents, title, message, ids]).encode()).hexdigest()
        history.append(Commit(sha, title, message, files))
        return sha


def oid_of(path: str, content: bytes) -> str:
    """
    SHA-256 of an LFS file, git's SHA-1 of a regular one; the client compares it to skip what the Hub has already.
    """
    if path.endswith(LFS_SUFFIXES) and content:  # an empty file is never sent as LFS
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves while its context is open. Writing needs a token, but any will do: `USER` may write to every repo."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.lfs_files: dict[str, bytes] = {}  # uploaded, by SHA-256; a commit refers to them
        self.requests: list[str] = []  # one "<method> <path?query> <status>" for each request so far
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()

    def commits(self, repo_id: str, revision: str = "main") -> list[tuple[str, str, dict[str, bytes]]]:
        """Sha, title and all files of each commit up to `revision`, oldest first."""
        return [(commit.sha, commit.title, commit.files) for commit in self.repos[repo_id].log(revision)]


class _Handler(BaseHTTPRequestHandler):
    """One method per route: it gets the groups of the route's regex and returns bytes, or what is sent as JSON."""

    server: HubServer
    protocol_version = "HTTP/1.1"  # keep-alive, like the real one
    disable_nagle_algorithm = True  # headers and body are two writes; the second would wait 40 ms for an ACK

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.status, self.extra_headers = 200, dict[str, str]()
        with self.server.lock:  # one request at a time: concurrent pushes become one commit after the other
            try:
                payload = self.route()
            except HubError as error:
                self.status, message, code = error.args
                self.extra_headers |= {"X-Error-Code": code, "X-Error-Message": message}
                payload = {"error": message}
            self.server.requests.append(f"{self.command} {self.path} {self.status}")
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(self.status)
        for name, value in (self.extra_headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error: `HubServer.requests` is the log."""

    def route(self) -> Any:
        path, _, self.query = self.path.partition("?")
        if self.command == "POST" and not self.headers.get("Authorization", "").startswith("Bearer "):
            raise HubError(401, "Invalid username or password.", "")
        for method, pattern, handler in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                # unquoted only now, because the client sends the branch `a/b` as `a%2Fb`
                return handler(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
        raise HubError(404, f"No route for {self.command} {path}", "")

    def find(self, repo_id: str) -> Repo:
        if repo_id not in self.server.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.server.repos[repo_id]

    def whoami(self) -> Any:
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    def create_repo(self) -> Any:
        payload = json.loads(self.body)
        repo_id = f"{payload['organization'] or USER}/{payload['name']}"
        repo = self.server.repos.setdefault(repo_id, Repo(repo_id))
        if repo.branches:
            self.status = 409  # with the URL all the same, for `exist_ok=True`
        else:
            repo.commit("main", "initial commit", "", {".gitattributes": GITATTRIBUTES})
        return {"url": f"{self.server.endpoint}/{repo_id}"}

    def create_branch(self, repo_id: str, revision: str) -> Any:
        repo = self.find(repo_id)
        if revision in repo.branches:
            raise HubError(409, f"Reference already exists: {revision}", "")
        repo.branches[revision] = repo.log(json.loads(self.body).get("startingPoint", "main"))
        return {}

    def model_info(self, repo_id: str, revision: str = "main") -> Any:
        head = self.find(repo_id).log(revision)[-1]
        return {"id": repo_id, "sha": head.sha, "tags": [], "siblings": [{"rfilename": path} for path in head.files]}

    def list_commits(self, repo_id: str, revision: str) -> Any:
        common = {"authors": [{"user": USER}], "date": "2026-01-01T00:00:00.000Z"}
        log = reversed(self.find(repo_id).log(revision))
        return [{"id": commit.sha, "title": commit.title, "message": commit.message} | common for commit in log]

    def list_tree(self, repo_id: str, revision: str, path: str = "") -> Any:
        files = self.find(repo_id).log(revision)[-1].files
        folder = path + "/" if path else ""
        tree: dict[str, dict[str, Any]] = {}
        for name in sorted(name for name in files if name.startswith(folder)):
            child, _, below = name.removeprefix(folder).partition("/")
            if below and "recursive=true" not in self.query:
                tree[child] = {"type": "directory", "path": folder + child, "oid": "0" * 40}
            else:
                tree[name] = {"type": "file", "path": name, "size": len(files[name]), "oid": oid_of(name, files[name])}
        if path and not tree:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return list(tree.values())

    def download(self, repo_id: str, revision: str, path: str) -> Any:
        head = self.find(repo_id).log(revision)[-1]
        self.extra_headers["X-Repo-Commit"] = head.sha
        if path not in head.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        self.extra_headers["ETag"] = f'"{oid_of(path, head.files[path])}"'
        return head.files[path]

    def preupload(self, repo_id: str, revision: str) -> Any:
        files, answers = self.find(repo_id).log(revision)[-1].files, []
        for path in [file["path"] for file in json.loads(self.body)["files"]]:
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = oid_of(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, repo_id: str) -> Any:
        objects = json.loads(self.body)["objects"]
        for item in [item for item in objects if item["oid"] not in self.server.lfs_files]:  # else: skipped
            item["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}}
        return {"objects": objects}

    def lfs_upload(self, oid: str) -> Any:
        self.server.lfs_files[oid] = self.body
        return {}

    def commit(self, repo_id: str, revision: str) -> Any:
        repo = self.find(repo_id)
        if revision not in repo.branches or "create_pr" in self.query:
            raise HubError(404, f"Not a branch to commit to: {revision}", "RevisionNotFound")
        (_, about), *operations = [(line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())]
        head = repo.branches[revision][-1]
        if not head.sha.startswith(about.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.", "")
        files = dict(head.files)
        for key, value in operations:
            path = value["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[path] = self.server.lfs_files[value["oid"]]
            else:  # "deletedFile", or "deletedFolder" with a slash at the end
                files = {name: files[name] for name in files if not f"{name}/".startswith(path.rstrip("/") + "/")}
        sha = repo.commit(revision, about["summary"], about["description"], files)
        return {"commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}"}


_REPO, _REVISION, _PATH = "(?P<repo_id>[^/]+/[^/]+)", "(?P<revision>[^/]+)", "(?P<path>.+)"
ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", _Handler.create_branch),
    ("GET", f"/api/models/{_REPO}(/revision/{_REVISION})?", _Handler.model_info),
    ("GET", f"/api/models/{_REPO}/commits/{_REVISION}", _Handler.list_commits),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(/{_PATH})?", _Handler.list_tree),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/{_PATH}", _Handler.download),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
)
