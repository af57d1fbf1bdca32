"""One of many clients, some of whose requests are wrong, cancelled or abandoned, and the tallies of all of them."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from PIL import Image

from clipgen.outputs.metadata import KEY, Receipt

THINGS = ("a lemon", "a red heart", "sketch of a cat", "a blue car", "a green apple", "a yellow star")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"candidates": 0}, "candidates"),
    ({"seed": -1}, "seed"),
    ({"prompt": " "}, "prompt"),
    ({"temperature": "hot"}, "temperature"),
    ({"num_outputs": 4, "candidates": 2}, "candidates"),
    ({"image": "file:///etc/passwd"}, "image"),
    ({"image": "http://127.0.0.1/x.png"}, "image"),
    ({"image": "data:image/png;base64,iVBORw0KGgo="}, "image"),
]
CRASHED = ("Worker crashed", "Failed to send request")
"""Beginnings of Cog's errors when its worker has died."""
PAUSE = 1.0
"""Longest time in seconds between an answer and the next request."""
PATIENCE = 180.0
"""Seconds after which a request counts as lost."""


class Soak:
    """The server's address and the tallies, shared by all clients."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.tries: list[int] = []
        self.times: dict[str, list[float]] = defaultdict(list)
        self.problems: list[str] = []
        self.hooks: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.hook_address = ""

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def problem(self, what: str) -> None:
        with self.lock:
            self.problems.append(what[:300])


def backoff(attempt: int, dice: random.Random) -> float:
    """Seconds to wait before trying again: 0.1, doubled each time up to 1, and up to half as much on top.

    Cog has no queue: a free slot goes to whoever asks first. A client that waits much longer between two tries than
    others do between two requests gets none.
    """
    return min(1.0, 0.1 * 2**attempt) * dice.uniform(1.0, 1.5)


class Client:
    """One client, which sends its next request when the one before has ended."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak, self.number = soak, number
        self.dice = random.Random(number)
        self.sent = 0
        self.http = httpx.Client(base_url=soak.address, timeout=PATIENCE)

    def inputs(self) -> dict[str, Any]:
        """Inputs with a prompt and a seed that no other request has."""
        self.sent += 1
        outputs = self.dice.choice((1, 1, 1, 2))
        return {
            "prompt": f"{self.dice.choice(THINGS)} {self.number}-{self.sent}",
            "seed": self.number * 1_000_000 + self.sent * 100,
            "num_outputs": outputs,
            "candidates": outputs * self.dice.choice((1, 1, 2)),
        }

    def run(self, end: float, kinds: dict[str, int]) -> None:
        """Send requests of random kinds until `end`."""
        acts: dict[str, Callable[[], None]] = {
            **{"plain": self.plain, "bad": self.bad, "cancel": self.cancel},
            **{"hang up": self.hang_up, "webhook": self.webhook},
        }
        while time.monotonic() < end:
            kind = self.dice.choices(list(kinds), list(kinds.values()))[0]
            try:
                acts[kind]()
            except Exception as error:
                self.soak.problem(f"{kind}: {type(error).__name__}: {error}")
            time.sleep(self.dice.uniform(0.0, PAUSE))
        self.http.close()

    def send(self, inputs: dict[str, Any], name: str = "", **more: Any) -> dict[str, Any]:
        """Send one request until it is answered: again after a refusal or a crash.

        Raises:
            TimeoutError: no answer in `PATIENCE` seconds.
        """
        start, attempt, crashes = time.monotonic(), 0, 0
        while time.monotonic() - start < PATIENCE:
            body = {"input": inputs, **({"id": name + "-again" * crashes} if name else {}), **more.get("body", {})}
            try:
                answer = self.http.post("/predictions", json=body, headers=more.get("headers"))
            except httpx.TransportError:
                self.soak.count("no connection, tried again")
            else:
                found = answer.json() if answer.status_code in (200, 202) else {}
                if answer.status_code == 422:  # Cog's own refusal of an input
                    found = {"status": "failed", "error": answer.text}
                if found and not str(found.get("error", "")).startswith(CRASHED):
                    with self.soak.lock:
                        self.soak.tries.append(attempt + 1)
                    return found
                self.refused(answer.status_code, found)
                crashes += bool(found)
            time.sleep(backoff(attempt, self.dice))
            attempt += 1
        raise TimeoutError(f"{inputs} was not answered in {PATIENCE:.0f} s")

    def refused(self, status: int, found: dict[str, Any]) -> None:
        if found:
            self.soak.count("worker crashed, tried again")
        elif status in (409, 503):
            self.soak.count(f"{status}, tried again")
        else:
            self.soak.problem(f"status {status}")

    def check(self, inputs: dict[str, Any], answer: dict[str, Any]) -> bool:
        """Whether the receipts inside the images are those of the request; if not, a problem is reported."""
        if answer["status"] != "succeeded" or len(answer["output"]) != inputs["num_outputs"]:
            self.soak.problem(f"{inputs}: {answer['status']} {str(answer.get('error'))[:100]}")
            return False
        for place, file in enumerate(answer["output"]):
            receipt = read(file)
            found = (receipt.prompt[0].text, receipt.seed, receipt.candidates, receipt.index)
            if found != (inputs["prompt"], inputs["seed"], inputs["candidates"], place):
                self.soak.problem(f"swapped: {inputs} came back as {found}")
                return False
        return True

    def plain(self) -> None:
        inputs, start = self.inputs(), time.monotonic()
        if not self.check(inputs, self.send(inputs)):
            return
        with self.soak.lock:
            self.soak.times["plain"].append(time.monotonic() - start)
        self.soak.count("images asked for, right ones came")

    def bad(self) -> None:
        change, field = self.dice.choice(BAD)
        answer = self.send(self.inputs() | change)
        if answer["status"] != "failed" or field not in answer["error"]:
            self.soak.problem(f"{change} was answered {answer['status']}: {str(answer.get('error'))[:100]}")
            return
        self.soak.count("bad requests, refused by name")

    def cancel(self) -> None:
        inputs = self.inputs() | {"candidates": 16}
        name = f"cancel-{self.number}-{self.sent}"
        ended = threading.Event()

        def stop() -> None:
            ended.wait(self.dice.uniform(0.0, 1.0))
            with suppress(httpx.TransportError):  # the server may be down just now
                while not ended.wait(0.1):  # until the prediction is accepted
                    if httpx.post(f"{self.soak.address}/predictions/{name}/cancel").status_code == 200:
                        return

        other = threading.Thread(target=stop)
        other.start()
        try:
            answer = self.send(inputs, name)
        finally:
            ended.set()
            other.join()
        if answer["status"] == "canceled":
            self.soak.count("cancelled, answered so")
        elif "CancelationException" in str(answer.get("error")):  # Cog's, once in hundreds
            self.soak.count("cancelled, answered failed")
        else:
            self.check(inputs, answer)
            self.soak.count("cancelled too late, right images came")

    def hang_up(self) -> None:
        patience = httpx.Timeout(5.0, read=self.dice.uniform(0.01, 0.6))
        try:
            httpx.post(
                f"{self.soak.address}/predictions", json={"input": self.inputs() | {"candidates": 8}}, timeout=patience
            )
        except httpx.TransportError:
            self.soak.count("hung up")

    def webhook(self) -> None:
        inputs = self.inputs()
        name = f"hook-{self.number}-{self.sent}"
        body = {"webhook": self.soak.hook_address, "webhook_events_filter": ["completed"]}
        start = time.monotonic()
        taken = self.send(inputs, name, body=body, headers={"Prefer": "respond-async"})
        while time.monotonic() - start < PATIENCE:
            if calls := self.soak.hooks.get(taken["id"]):
                break
            time.sleep(0.05)
        else:
            self.soak.problem(f"{taken['id']}: its webhook was never called")
            return
        if str(calls[0].get("error", "")).startswith(CRASHED):
            self.soak.count("webhook told of the crash")
            return
        if self.check(inputs, calls[0]):
            self.soak.count("webhooks called, right images came")


def read(file: str) -> Receipt:
    """The receipt in a PNG that came as a data: URL."""
    image = Image.open(io.BytesIO(base64.b64decode(file.partition(",")[2])))
    return Receipt.from_metadata({KEY: image.info[KEY]})


def receive(soak: Soak) -> ThreadingHTTPServer:
    """Start a receiver of webhooks."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with soak.lock:
                soak.hooks[found["id"]].append(found)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    soak.hook_address = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
