"""TLS: clients verify it, a renewed certificate is taken at SIGHUP, and a bad one is not."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from moebius.errors import ConfigError
from moebius.server.tls import Certificate
from server.serving import MODEL, engine, listening

openssl = shutil.which("openssl")
pytestmark = pytest.mark.skipif(openssl is None, reason="openssl makes the certificates")


def make(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


def ask(port: int, trusted: Path) -> str:
    """The text of a stream, from a client that trusts this certificate alone."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3, "stream": True}
    with httpx.Client(verify=ssl.create_default_context(cafile=trusted), timeout=20) as client:
        response = client.post(f"https://127.0.0.1:{port}/v1/completions", json=body)
    assert response.status_code == 200
    assert response.http_version == "HTTP/1.1"
    return response.text


def test_a_client_is_served_and_a_renewed_certificate_is_read_again(tmp_path: Path) -> None:
    paths = make(tmp_path, "served")
    old, new = make(tmp_path, "old"), make(tmp_path, "new")

    def put(pair: tuple[Path, Path]) -> None:
        for source, target in zip(pair, paths, strict=True):
            shutil.copy(source, target)

    put(old)
    certificate = Certificate(*paths)
    with listening(engine(), certificate=certificate) as (port, _):
        assert ask(port, old[0]).endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match=r"CERTIFICATE_VERIFY_FAILED|self.signed"):
            ask(port, new[0])
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=20)
        for wrong in ((new[0], old[1]), (old[1], old[1])):
            put(wrong)
            with pytest.raises(ConfigError):
                certificate.reload()
            assert ask(port, old[0])
        put(new)
        certificate.reload()
        assert ask(port, new[0])


def test_what_is_no_certificate_is_said_in_one_line(tmp_path: Path) -> None:
    certificate, key = make(tmp_path, "a")
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    Certificate(both, None)
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", key, "-out", locked],
        check=True,
        capture_output=True,
        timeout=60,
    )
    for pair, said in (
        ((certificate, None), "with key in the same file"),
        ((tmp_path / "none", key), "No such file"),
        ((certificate, locked), "has a password"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            Certificate(*pair)
        assert "\n" not in str(error.value)
