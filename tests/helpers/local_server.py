"""A real HTTP server on the loopback interface whose answers can be late, cut off or wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """How one request is answered; the defaults are those of a correct server.

    Attributes:
        status: any other than 200 is sent without the file.
        headers: added to the usual ones or replacing them; None omits one.
        cut: bytes of the body to send before closing the connection.
        ranges: whether Range requests are honoured.
        pace: seconds to wait after each `piece` bytes, until `hurry` is set.
        piece: bytes to send at once.
        shift: error added to the start that Content-Range states.
    """

    status: int = 200
    headers: dict[str, str | None] = field(default_factory=dict)
    cut: int | None = None
    ranges: bool = True
    pace: float = 0.0
    piece: int = 1 << 16
    shift: int = 0
    hurry: threading.Event = field(default_factory=threading.Event)


@dataclass
class Server:
    """Its files, its next answers, and the requests it has received."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    default: Answer = field(default_factory=Answer)
    etag: str | None = '"one"'
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, path: str, content: bytes) -> str:
        """Add a file and return its URL."""
        self.files[path] = content
        return f"{self.address}{path}"

    def ranges_asked(self) -> list[str | None]:
        return [headers.get("range") for _, headers in self.requests]


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            with server.lock:
                asked = {name.lower(): value for name, value in self.headers.items()}
                server.requests.append((self.path, asked))
                answer = server.answers.pop(0) if server.answers else server.default
            content = server.files.get(self.path)
            if content is None and answer.status == 200:
                self.reply(Answer(status=404), {}, b"")
            elif answer.status != 200:
                self.reply(answer, {"Content-Length": "4"}, b"oops")
            else:
                self.send_file(answer, content or b"", asked)
            self.close_connection = True

        def send_file(self, answer: Answer, content: bytes, asked: dict[str, str]) -> None:
            start = int(asked.get("range", "bytes=0-")[len("bytes=") : -1])
            same = asked.get("if-range") in (None, server.etag)
            headers = {"Content-Type": "application/octet-stream"} | ({"ETag": server.etag} if server.etag else {})
            if start and answer.ranges and same:
                if start >= len(content):
                    self.reply(Answer(status=416), {"Content-Range": f"bytes */{len(content)}"}, b"")
                    return
                begin = start + answer.shift
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                body, status = content[start:], 206
            else:
                body, status = content, 200
            self.reply(Answer(**vars(answer) | {"status": status}), headers | {"Content-Length": str(len(body))}, body)

        def reply(self, answer: Answer, headers: dict[str, str], body: bytes) -> None:
            self.send_response(answer.status)
            for name, value in (headers | answer.headers).items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            body = body[: answer.cut]
            try:
                for at in range(0, len(body), answer.piece):
                    self.wfile.write(body[at : at + answer.piece])
                    self.wfile.flush()
                    if answer.pace and not answer.hurry.is_set():
                        time.sleep(answer.pace)
            except OSError:  # the client has hung up
                pass

    return Handler


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server until the block ends."""
    server = Server("")
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    server.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def wait_until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    """Poll until a condition holds; fail when the time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
