"""The cluster's key: made, read, and nowhere to be seen."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import pytest

from moebius.cli.main import main
from moebius.errors import ConfigError
from moebius.parallel.key import VARIABLE, ClusterKey

TEXT = "00112233445566778899aabbccddeeff" * 2


def test_a_drawn_key_is_a_new_one_and_comes_back_by_its_text() -> None:
    first, second = ClusterKey.draw(), ClusterKey.draw()
    assert first != second and ClusterKey.from_text(first.text) == first
    assert len(bytes.fromhex(first.text)) == 32


def test_a_key_is_read_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "key"
    file.write_text(TEXT.upper() + "\n")
    file.chmod(0o600)
    assert ClusterKey.from_file(file).text == TEXT and caplog.text == ""
    file.chmod(0o644)
    assert ClusterKey.from_file(file).text == TEXT and "chmod 600" in caplog.text
    monkeypatch.delenv(VARIABLE, raising=False)
    assert ClusterKey.from_environment() is None
    monkeypatch.setenv(VARIABLE, f" {TEXT} ")
    assert ClusterKey.from_environment() == ClusterKey.from_file(file)


@pytest.mark.parametrize("text", ["", TEXT[:-1], TEXT + "0", TEXT[:-1] + "g", "é" * 64])
def test_what_is_no_key_is_refused_and_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    monkeypatch.setenv(VARIABLE, text)
    for read, source in (
        (lambda: ClusterKey.from_file(file), str(file)),
        (ClusterKey.from_environment, VARIABLE),
    ):
        with pytest.raises(ConfigError, match="64 hexadecimal digits") as error:
            read()
        assert source in str(error.value) and (not text or text not in str(error.value))
    with pytest.raises(ConfigError, match="No such file"):
        ClusterKey.from_file(tmp_path / "none")
    with pytest.raises(ConfigError, match="32 bytes, not 3"):
        ClusterKey(b"abc")


def test_a_key_shows_itself_nowhere() -> None:
    key = ClusterKey.from_text(TEXT)
    assert TEXT not in repr(key) + str(key) + f"{[key]}"
    with pytest.raises(TypeError):
        pickle.dumps(key)
    with pytest.raises(TypeError):
        copy.copy(key)
    with pytest.raises(TypeError):
        hash(key)
    assert key != TEXT


def test_what_is_derived_is_keyed_and_of_one_purpose() -> None:
    key = ClusterKey.from_text(TEXT)
    expected = hashlib.blake2b(b"ab", key=bytes.fromhex(TEXT), person=b"x", digest_size=32)
    assert key.derive(b"x", b"a", b"b") == expected.digest()
    others = {
        key.derive(b"y", b"ab"),
        key.derive(b"x", b"ac"),
        ClusterKey.draw().derive(b"x", b"ab"),
    }
    assert len(others | {expected.digest()}) == 4


def test_the_command_prints_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["moebius", "cluster", "key"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        keys.append(capsys.readouterr().out)
    assert keys[0] != keys[1] and all(ClusterKey.from_text(key).text == key.strip() for key in keys)
