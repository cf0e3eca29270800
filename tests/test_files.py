"""Files are written whole or not at all, through links, and never over what somebody else put
there."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.errors import ConfigError, StorageError
from moebius.files import (
    Content,
    anyone,
    begins_with,
    check_apart,
    check_target,
    short_name,
    signed,
    write_file,
)

OURS = begins_with(b"ours")


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_new_file_is_readable_by_all(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", "grüße\n", ours=OURS)
    assert (tmp_path / "a.txt").read_bytes() == "grüße\n".encode()
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
    assert left_over(tmp_path) == []


def test_our_own_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ours, old")
    path.chmod(0o600)
    write_file(path, b"ours, new", ours=OURS)
    assert path.read_text() == "ours, new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.case("C13")
def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a year of notes")
    with pytest.raises(ConfigError, match=r"notes\.txt holds something else"):
        write_file(path, "ours", ours=OURS)
    assert path.read_text() == "a year of notes"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="holds something else"):
        write_file(link, "ours", ours=OURS)
    assert path.read_text() == "a year of notes" and link.is_symlink()


def test_an_empty_file_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "made.txt").touch()
    write_file(tmp_path / "made.txt", "ours", ours=OURS)
    assert (tmp_path / "made.txt").read_text() == "ours"


@pytest.mark.case("C13")
def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "real.txt", tmp_path / "link.txt"
    link.symlink_to(Path("disk") / "real.txt")
    write_file(link, "ours, first", ours=OURS)
    write_file(link, "ours, second", ours=OURS)
    assert link.is_symlink() and target.read_text() == "ours, second"
    assert left_over(tmp_path) == [] == left_over(tmp_path / "disk")


def test_a_link_into_nowhere_and_a_circle_are_errors(tmp_path: Path) -> None:
    (tmp_path / "away").symlink_to(tmp_path / "gone" / "file")
    with pytest.raises(StorageError, match="directory that exists"):
        write_file(tmp_path / "away", "ours", ours=OURS)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StorageError, match="cannot be written"):
        write_file(tmp_path / "a", "ours", ours=OURS)


def test_directories_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a directory"):
        write_file(tmp_path, "ours", ours=anyone)
    with pytest.raises(StorageError, match="directory that exists"):
        write_file(tmp_path / "none" / "file", "ours", ours=anyone)


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """A rename over /dev/null, which the administrator may do, would take the device from
    everybody."""
    write_file("/dev/null", "ours", ours=OURS)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, b"through a pipe", ours=OURS)
    assert os.read(reader, 100) == b"through a pipe" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: what a full disk does, where there is
    none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.case("C19")
def test_without_room_the_old_file_stays_and_nothing_is_left_over(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, lambda at: save_file({"a": torch.ones(2)}, at), ours=anyone)
    large = {"a": torch.zeros(10_000)}
    contents: list[Content] = [lambda at: save_file(large, at), bytes(40_000), "x" * 40_000]
    for content in contents:
        with (
            room_for(2_000),
            pytest.raises(StorageError, match=r"model\.safetensors cannot be .*too large"),
        ):
            write_file(path, content, ours=anyone)
        assert load_file(path)["a"].tolist() == [1.0, 1.0]
        assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_any_failure_leaves_no_partial_file(tmp_path: Path) -> None:
    def broken(at: Path) -> None:
        at.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a.txt", broken, ours=anyone)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_reaches_whoever_writes(tmp_path: Path) -> None:
    suffixes: list[str] = []

    def draw(at: Path) -> None:
        suffixes.append(at.suffix)
        at.write_bytes(b"x")

    write_file(tmp_path / "chart.svg", draw, ours=anyone)
    assert suffixes == [".svg"]


def test_what_is_said_before_is_what_is_said_after(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    check_target(tmp_path / "new", OURS)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="holds something else"):
        check_target(tmp_path / "notes", OURS)
    with pytest.raises(ConfigError, match="directory"):
        check_target(tmp_path, OURS)


def test_a_mark_is_found_at_either_end(tmp_path: Path) -> None:
    ours = signed(b"Moebius")
    for place in (b"Moebius" + bytes(10**6), bytes(10**6) + b"Moebius"):
        (tmp_path / "chart").write_bytes(place)
        assert ours(tmp_path / "chart")
    (tmp_path / "chart").write_bytes(bytes(10**6) + b"Moebius" + bytes(10**6))
    assert not ours(tmp_path / "chart")


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    for name in ("n" * 255, f"n.{'s' * 253}"):
        write_file(tmp_path / name, b"ours", ours=OURS)
        assert (tmp_path / name).read_bytes() == b"ours"
    assert left_over(tmp_path) == []


@pytest.mark.case("C13")
def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    there, link, hard, new = (tmp_path / name for name in ("there", "link", "hard", "new"))
    there.write_text("ours")
    link.symlink_to(there)
    hard.hardlink_to(there)
    (tmp_path / "to_new").symlink_to(new)
    (tmp_path / "folder").mkdir()
    roundabout = tmp_path / "folder" / ".." / "new"
    for one, other in (
        (there, link),
        (hard, there),
        (new, new),
        (new, roundabout),
        (tmp_path / "to_new", new),
    ):
        with pytest.raises(
            ConfigError, match=r"--output-json and --trace are one file, .*; name two"
        ):
            check_apart(output_json=one, plot=None, trace=other)
    check_apart(output_json=there, plot=new, trace=None)
    check_apart(output_json=Path("/dev/null"), plot=Path("/dev/null"))


@pytest.mark.parametrize(
    ("path", "name"),
    [("some/folder/m.gguf", "folder/m.gguf"), ("m.gguf", "m.gguf"), ("/m.gguf", "/m.gguf")],
)
def test_a_short_name_is_a_path_that_could_have_been_given(path: str, name: str) -> None:
    assert short_name(Path(path)) == name
