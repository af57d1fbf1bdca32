"""A local server that speaks the Hub's paths for files: HEAD and GET of /USER/REPO/resolve/REVISION/FILE.

As huggingface.co does, it answers with the commit and an ETag, and with an error code where something does not exist.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PATH = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """Repositories as {repo: {commit: {file: content}}}, their branches, and the requests received.

    Attributes:
        private: token that is needed to see any repository; None for public ones.
        cut: bytes of a file after which the connection breaks off; None for never.
    """

    address: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    private: str | None = None
    cut: int | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def publish(self, folder: Path, repo: str = "someone/lemons", branch: str = "main") -> str:
        """Commit the files of a folder to a branch; returns the commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        commit = hashlib.sha1(
            repr(sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())).encode()
        ).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.branches[repo, branch] = commit
        return commit

    def fetched(self) -> list[str]:
        """Names of the files whose content was sent, in order."""
        return [match["file"] for method, path in self.requests if method == "GET" and (match := PATH.fullmatch(path))]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, with_body: bool) -> None:
            hub.requests.append((self.command, self.path))
            match = PATH.fullmatch(self.path)
            commits = hub.repos.get(match["repo"]) if match else None
            if hub.private and self.headers.get("Authorization") != f"Bearer {hub.private}":
                commits = None
            if match is None or commits is None:
                return self.refuse(401, "RepoNotFound")  # which does not tell private from absent
            commit = hub.branches.get((match["repo"], match["revision"]), match["revision"])
            if commit not in commits:
                return self.refuse(404, "RevisionNotFound")
            content = commits[commit].get(match["file"])
            if content is None:
                return self.refuse(404, "EntryNotFound", commit)
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content[: hub.cut])

        def refuse(self, status: int, code: str, commit: str = "") -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.end_headers()

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

    return Handler


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Yield a Hub that is served until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
