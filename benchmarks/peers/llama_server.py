"""llama.cpp's llama-server as a process that ends with this one, asked over loopback HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import end_with_parent

START_SECONDS = 300
ANSWER_SECONDS = 3600


class LlamaServer:
    """A server of one model. Raises RuntimeError where it does not start.

    settings: options with a value; flags: those without.
    """

    def __init__(
        self,
        program: Path,
        model: Path,
        settings: Mapping[str, object],
        flags: Sequence[str] = (),
    ) -> None:
        words = [str(word) for setting in settings.items() for word in setting]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        command = [str(program), "--model", str(model), *words, *flags]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        # Its own messages go where ours go.
        self._process = subprocess.Popen(command, stdout=2, preexec_fn=end_with_parent)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def open(self, path: str, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        """Post a body as JSON. Raises RuntimeError for what is no success."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_SECONDS)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"llama-server: {response.status} {response.read()[:500]!r}")
        return response

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers, as JSON."""
        return json.loads(self.open(path, body).read())

    def get(self, path: str) -> Any:
        """Likewise, asked for without a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_SECONDS)
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self._process.returncode}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass  # it does not listen yet
            time.sleep(0.02)
        raise RuntimeError(f"llama-server was not ready after {START_SECONDS} s")
