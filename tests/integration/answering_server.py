"""A server that answers as OpenAI's do, and as a bad one does: for the tests of `generate`."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler", str, int], bool]
"""Is given a request, its question and how often it was asked; answers it itself and says so, or not."""


def said(question: str, seed: int) -> str:
    """What the server answers: a few words that depend on question and seed."""
    words = [hashlib.sha256(f"{question} {seed} {index}".encode()).hexdigest()[:7] for index in range(12)]
    return " ".join(words)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "AnsweringServer"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked[question, body["seed"]] += 1
            count = self.server.asked[question, body["seed"]]
            self.server.requests.append((dict(self.headers), body))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            if self.server.fault is None or not self.server.fault(self, question, count):
                self.answer({"content": said(question, body["seed"])})
        except (BrokenPipeError, ConnectionResetError):
            pass  # the command was killed
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def answer(self, message: dict[str, Any], finish: str = "stop") -> None:
        choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
        reply = {"model": "served", "choices": [choice], "usage": {"completion_tokens": 7}}
        self.send(200, json.dumps(reply).encode())

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class AnsweringServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, fault: Fault | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.lock = fault, threading.Lock()
        self.asked: Counter[tuple[str, int]] = Counter()
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(fault: Fault | None = None) -> Iterator[AnsweringServer]:
    server = AnsweringServer(fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slow(seconds: float) -> Fault:
    def wait(handler: Handler, question: str, count: int) -> bool:
        time.sleep(seconds)
        return False

    return wait
