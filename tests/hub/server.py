"""A small Hugging Face Hub on loopback: what the real client asks for when it downloads and uploads, and faults.

Repositories live in memory. Files over `LFS_THRESHOLD` bytes and ``.safetensors`` go the way of large files:
``resolve`` redirects to another host (the CDN) and carries their SHA-256 and size, and uploads go through the LFS batch
API. Small ones are served directly with git's blob hash as ETag. Every request is noted in `LoopbackHub.requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_THRESHOLD = 100_000


@dataclass
class Fault:
    """What happens to requests instead of the right answer.

    Attributes:
        method: HTTP method it applies to, or ``""`` for every one.
        path: Text that the path contains.
        times: How many requests it hits.
        status: Answer with this status and ``headers`` instead.
        headers: Headers of that answer.
        body: Content of that answer.
        add: Headers that replace those of the right answer, or come on top.
        drop: Headers that the right answer lacks.
        change: Serve this function of the content instead.
        cut_after: Send so many bytes of the promised body, then close the connection.
        before: Called before the request is answered, for instance to wait.
    """

    method: str = "GET"
    path: str = ""
    times: int = 1_000_000
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    add: dict[str, str] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    change: Callable[[bytes], bytes] | None = None
    cut_after: int | None = None
    before: Callable[[], Any] | None = None


@dataclass
class Repository:
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return next((entry for entry in self.commits if entry[0] == commit), None)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        parent = self.files(branch)
        content = ({} if parent is None else parent[1]) | files
        identity = repr([len(self.commits), sorted((k, hashlib.sha256(v).hexdigest()) for k, v in content.items())])
        commit = hashlib.sha1(identity.encode()).hexdigest()
        self.commits.append((commit, content))
        self.refs[branch] = commit
        return commit


class LoopbackHub:
    """The server and its state.

    Attributes:
        endpoint: What ``HF_ENDPOINT`` must be.
        repositories: By ``owner/name``.
        requests: ``(method, path)`` of everything that was asked.
        faults: Those that are in force.
        token: The only token with which uploads are allowed; ``None`` allows everybody.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.authorizations: list[tuple[str, str | None]] = []
        self.faults: list[Fault] = []
        self.token: str | None = None
        self.lock = threading.RLock()
        self.large: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}/cdn"  # another host name: the client must not send its token there
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()  # ends quickly

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Put files into a repository; returns the commit."""
        with self.lock:
            return self.repositories.setdefault(repo, Repository()).commit(files)

    @contextmanager
    def fault(self, **kwargs: Any) -> Iterator[Fault]:
        """Be at fault for a while."""
        fault = Fault(**kwargs)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def downloads(self, text: str = "") -> list[str]:
        """Paths of the contents that were really sent."""
        return [path for method, path in self.requests if method == "GET" and text in path]


def is_large(path: str, size: int) -> bool:
    return size > LFS_THRESHOLD or path.endswith(".safetensors")


def etag(path: str, content: bytes) -> str:
    if is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return git_hash(content)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: LoopbackHub

    def log_message(self, *args: Any) -> None:
        pass

    # --- answers ---

    def _answer(self, status: int, body: bytes = b"", fault: Fault | None = None, **headers: str) -> None:
        self.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if fault is not None:
            given = {name: value for name, value in (given | fault.add).items() if name not in fault.drop}
        for name, value in given.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut_after is not None:
            self.wfile.write(body[: fault.cut_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message)

    def _fault(self) -> Fault | None:
        with self.state.lock:
            for fault in self.state.faults:
                if fault.times > 0 and fault.method in ("", self.command) and fault.path in self.path:
                    fault.times -= 1
                    return fault
        return None

    def _begin(self) -> tuple[Fault | None, bool, bytes]:
        """Note the request, read its body, apply a fault; says whether it is answered already."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.state.requests.append((self.command, self.path))
        self.state.authorizations.append((self.path, self.headers.get("Authorization")))
        fault = self._fault()
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.status is not None:
            self._answer(fault.status, fault.body, **fault.headers)
            return fault, True, body
        return fault, False, body

    # --- reading ---

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        fault, done, _ = self._begin()
        path = unquote(urlsplit(self.path).path)
        if done:
            return
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._content(self.state.large[match[1]], fault)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/tree/([^/]+))?", path):
            self._info(match[1], match[2] or match[3] or "main", tree=match[3] is not None)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", urlsplit(self.path).path):
            self._resolve(*(unquote(part) for part in match.groups()), fault)  # a branch may have a slash in it
        elif match := re.fullmatch(r"/mirror/(.+)", path):
            self._content(self.state.repositories["mirror"].commits[-1][1][match[1]], fault)
        else:
            self._error(404, "NotFound", "no such page")

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.state.repositories:
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        found = self.state.repositories[repo].files(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _info(self, repo: str, revision: str, tree: bool) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        commit, files = found
        if tree:
            entries = []
            for path, content in files.items():
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": etag(path, content)}
                if is_large(path, len(content)):
                    entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self._json(entries)
        else:
            siblings = [self._sibling(*file, "blobs=true" in self.path.lower()) for file in files.items()]
            self._json({"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _sibling(self, path: str, content: bytes, blobs: bool) -> dict[str, Any]:
        """A file in the listing of a repository; with ``?blobs=true`` with its size and checksums."""
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": len(content), "blobId": git_hash(content)}
            if is_large(path, len(content)):  # git then holds a pointer, whose hash is not that of the content
                digest = hashlib.sha256(content).hexdigest()
                sibling |= {"blobId": git_hash(digest.encode())}
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return sibling

    def _resolve(self, repo: str, revision: str, path: str, fault: Fault | None) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            message = "Entry not found"
            self._answer(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message=message, X_Repo_Commit=commit)
            return
        content = files[path]
        if is_large(path, len(content)):
            digest = etag(path, content)
            self.state.large[digest] = content
            linked = {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
            self._answer(302, b"", fault, Location=f"{self.state.cdn}/{digest}", **linked)
        else:
            self._content(content, fault, ETag=f'"{etag(path, content)}"', X_Repo_Commit=commit)

    def _content(self, content: bytes, fault: Fault | None, **headers: str) -> None:
        if fault is not None and fault.change is not None:
            content = fault.change(content)
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if requested:
            self.state.ranges.append(self.headers["Range"])
            start = int(requested[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], fault, **headers)
        else:
            self._answer(200, content, fault, **headers)

    # --- writing ---

    def _allowed(self) -> bool:
        if self.state.token is None or self.headers.get("Authorization") == f"Bearer {self.state.token}":
            return True
        self._error(401 if self.headers.get("Authorization") is None else 403, "", "You may not write here")
        return False

    def do_POST(self) -> None:
        _, done, body = self._begin()
        path = unquote(urlsplit(self.path).path)
        if done:
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._allowed():
            return
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            exists = repo in self.state.repositories
            self.state.repositories.setdefault(repo, Repository()).refs.setdefault("main", "")
            self._json({"url": f"{self.state.endpoint}/{repo}", "id": repo}, 409 if exists else 200)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            refs = self.state.repositories[match[1]].refs
            status = 409 if match[2] in refs else 200
            refs.setdefault(match[2], refs["main"])
            self._json({}, status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"], f["size"]) else "regular"} for f in files
            ]
            self._json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{self.state.endpoint}/lfs/{wanted['oid']}", "header": {}}}
                known = wanted["oid"] in self.state.large
                objects.append(wanted | ({} if known else {"actions": actions}))
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(match[1], match[2], body)
        else:
            self._error(404, "NotFound", "no such page")

    def do_PUT(self) -> None:
        _, done, body = self._begin()
        if done:
            return
        digest = hashlib.sha256(body).hexdigest()
        if self.path != f"/lfs/{digest}":
            self._error(400, "", "the content has another checksum")
            return
        self.state.large[digest] = body
        self._answer(200)

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
        with self.state.lock:
            commit = self.state.repositories[repo].commit(files, branch)
        self._json({"commitUrl": f"{self.state.endpoint}/{repo}/commit/{commit}", "commitOid": commit, "success": True})
