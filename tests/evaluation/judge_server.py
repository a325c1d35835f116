"""A local endpoint that behaves as a test wants."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from infotok_lit.evaluation.endpoint import Endpoint

Behaviour = Callable[[BaseHTTPRequestHandler, dict], None]


class Server:
    """An endpoint that treats the n-th call as the n-th behaviour says, and every later one as the last does."""

    def __init__(self) -> None:
        self.behaviours: list[Behaviour] = []
        self.calls: list[dict] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.calls)
                    outer.calls.append(body)
                    outer.keys.append(self.headers["Authorization"])
                outer.behaviours[min(number, len(outer.behaviours) - 1)](self, body)

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.endpoint = Endpoint(url, "judge-1", "NO_KEY_HERE", timeout=60, tries=4, wait=0.01, workers=2)


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def says(text: object, usage: object = None) -> Behaviour:
    completion = {"choices": [{"message": {"content": text}}], "usage": usage}
    return lambda handler, body: send(handler, 200, json.dumps(completion).encode())


def fails(status: int) -> Behaviour:
    return lambda handler, body: send(handler, status, b"sorry")
