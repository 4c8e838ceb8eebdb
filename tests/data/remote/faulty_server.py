"""A server on loopback that fails as real ones do."""

import http.server
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

#: What goes wrong: an error, a reset, a body cut off (with its length announced, or none), flipped
#: bytes, and a transfer that stands still half-way or before its first byte.
KINDS = ("503", "reset", "half", "short", "flip", "stall", "mute")


class Faulty(http.server.ThreadingHTTPServer):
    """Serves a folder; of every five requests one, drawn with a seed, goes wrong.

    The kinds come in turn. `always` makes each request of a shard go wrong in that way. Nothing
    could notice a flipped byte of manifest.json: that request gets another fault.
    """

    daemon_threads = True

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.lock, self.over = threading.Lock(), threading.Event()
        self.done: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.headers: list[str] = []
        self.always = ""
        self.rate = 5
        self.kinds = list(KINDS)
        self._hand: list[bool] = []
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.headers.append(str(self.headers))
                outer.serve(self, outer.draw(self.path.rsplit("/", 1)[-1]))

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self, name: str) -> str:
        """The fault of this request, or nothing."""
        with self.lock:
            self.asked[name] += 1
            kind = ""
            if self.always:
                kind = self.always if name.endswith(".tar") else ""
            elif self.rate:
                if not self._hand:
                    self._hand = [True] + [False] * (self.rate - 1)
                    self.random.shuffle(self._hand)
                if self._hand.pop():
                    harmless = name == "manifest.json"
                    kind = next(k for k in self.kinds if not (harmless and k in ("flip", "short")))
                    self.kinds.remove(kind)
                    self.kinds.append(kind)
            self.done[kind] += 1
            return kind

    def serve(self, handler: http.server.SimpleHTTPRequestHandler, kind: str) -> None:
        path = Path(handler.translate_path(handler.path))
        if not path.is_file():
            handler.send_error(404)
        elif kind == "reset":
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            handler.connection.close()
        elif kind.isdigit():
            handler.send_error(int(kind))
        elif kind == "mute":
            self.over.wait(20)
        else:
            content = bytearray(path.read_bytes())
            handler.send_response(200)
            if kind != "short":
                handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            if kind.startswith("flip"):
                at = 0 if kind == "flip the same" else self.random.randrange(len(content))
                content[at] ^= 1
            half = kind in ("half", "short", "stall")
            handler.wfile.write(content[: len(content) // 2] if half else content)
            if kind == "stall":
                handler.wfile.flush()
                self.over.wait(20)
        handler.close_connection = True

    def handle_error(self, *_: object) -> None:
        """Clients that hang up, and the sockets that were closed under the handler."""


@contextmanager
def serving(folder: Path) -> Iterator[Faulty]:
    with Faulty(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
