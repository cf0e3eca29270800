"""Where a model's files are: here, in this package, or downloaded from the Hugging Face hub."""

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moebius.errors import ConfigError
from moebius.gguf import first_file, is_gguf
from moebius.models.gguf_files import chosen, gguf_choices

Found = TypeVar("Found")

BUNDLED = "bundled"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
# What the hub allows: huggingface_hub refuses other names with errors of its own, and so does the
# hub.
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}/{_PART}")
# All but weights of what is loaded, and what fine-tuning hands on.
_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "LICEN[CS]E*",
    "NOTICE*",
    "README.md",
]
_SAFETENSORS = "*.safetensors"
# Copies of the same weights in another layout, and those of other models: twice the download.
_NOT_FILES = ["consolidated*.safetensors", "*/*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as it was asked for, and where its files are: see `find_model`.

    path             a directory, or a GGUF file
    tokenizer        the directory or GGUF file of a tokenizer that is used instead of the model's
    file             which of several GGUF files was asked for
    tokenizer_name   what `tokenizer` was asked for as
    """

    name: str
    path: Path
    tokenizer: Path | None = None
    file: str | None = None
    tokenizer_name: str | None = None


def find_model(name: str, file: str | None = None, tokenizer: str | None = None) -> ModelSource:
    """The files of a model, and of the tokenizer that it is to be used with, by their names.

    Raises ConfigError as resolve_model.
    """
    other = None if tokenizer is None else resolve_tokenizer(tokenizer)
    return ModelSource(name, resolve_model(name, file), other, file, tokenizer)


def resolve_model(name: str, file: str | None = None) -> Path:
    """The directory of a model, or its GGUF file (of several the first): an existing one,
    "bundled", or the local copy of a hub id such as org/name.

    file: which GGUF file of a directory or a hub id, by name or a part of it. A hub model is
    downloaded once (a progress bar shows it) and then served from the cache, offline too. Raises
    ConfigError saying what the name was taken for, what is wrong, and what would be right.
    """
    path = _local(name)
    if path is not None and path.is_file():
        if file is not None:
            raise ConfigError(f"--file {file} chooses among a directory's files; {name} is one")
        return path.with_name(first_file(path.name))
    if path is not None:
        return _of_directory(path, name, file)
    if name == BUNDLED:
        return _of_directory(_bundled(), name, file)
    _check_hub_id(name)
    return _of_repository(name, file)


def resolve_tokenizer(name: str) -> Path:
    """The directory or GGUF file that holds a tokenizer: an existing one, "bundled", or the local
    copy of a hub id, without its weights. Raises ConfigError."""
    path = _local(name) or (_bundled() if name == BUNDLED else None)
    if path is not None:
        return path
    _check_hub_id(name)
    return _download(name, _SMALL_FILES)


def _bundled() -> Path:
    path = Path(__file__).parent.parent / "bundled"
    if path.is_dir():
        return path
    raise ConfigError(
        "this installation carries no bundled model; name a model directory or a hub id (org/name)"
    )


def _check_hub_id(name: str) -> None:
    """Raises ConfigError where a name that is nothing here can be no hub id either."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        what = "file" if name.endswith(".gguf") else "directory"
        raise ConfigError(
            f"there is no {what} {name}; name a model directory, a GGUF file, a hub id (org/name) "
            f"or {BUNDLED!r}"
        )
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{name!r} is neither a directory or GGUF file that is here nor a hub id (org/name, "
            "each of letters, digits, '-', '_' and '.', with neither '--' nor '..' in it nor '-' "
            f"or '.' at an end) nor {BUNDLED!r}"
        )


def _local(name: str) -> Path | None:
    """The directory or GGUF file of that name, None where there is none."""
    try:
        path = Path(name).expanduser()
        if name and (path.is_dir() or (is_gguf(path) and path.exists())):
            return path
        if name and path.exists():
            raise ConfigError(
                f"{name} is a file; name a GGUF file, or the directory that holds config.json and "
                "the safetensors files"
            )
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be looked at: {error.strerror}; name a model directory or a hub id"
        ) from None
    except RuntimeError:
        raise ConfigError(
            f"{name}: there is no such user's home; name a model directory or a hub id"
        ) from None
    return None


def _of_directory(path: Path, name: str, file: str | None) -> Path:
    """The directory, if its model is one; else the GGUF file that is meant."""
    choices = gguf_choices(_local_sizes(path))
    if file is None and (_has_safetensors(path) or not choices):
        return _with_config(path, name)
    return path / chosen(choices, file, name).name


def _has_safetensors(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob(_SAFETENSORS))


def _local_sizes(path: Path) -> dict[str, int]:
    """Of a directory's GGUF files, by their names."""
    return {each.name: each.stat().st_size for each in path.glob("*.gguf") if each.is_file()}


def _with_config(path: Path, name: str) -> Path:
    """The path, if a model is there. Raises ConfigError that names a directory below it where one
    is."""
    if (path / "config.json").is_file():
        return path
    below = sorted(
        found.parent
        for found in [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")]
    )
    hint = (
        f"did you mean {below[0]}?"
        if below
        else "a model needs one, and safetensors files beside it, or is a GGUF file"
    )
    raise ConfigError(f"{name} is there, but without a config.json; {hint}")


def _of_repository(name: str, file: str | None) -> Path:
    """The local copy of a hub model: of its safetensors files, or of one GGUF model."""
    if file is None:
        path = _download(name, [*_SMALL_FILES, _SAFETENSORS])
        if _has_safetensors(path):
            return path
        choices = gguf_choices(_repository_sizes(name))
        if not choices:
            return _with_config(path, name)
    else:
        choices = gguf_choices(_repository_sizes(name))
    choice = chosen(choices, file, name)
    return _download(name, [*_SMALL_FILES, *choice.files]) / choice.name


def _repository_sizes(repo_id: str) -> dict[str, int]:
    """Of a repository's files, by their names: as the hub has them, or offline as the cache has."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        kept = _download(repo_id, _SMALL_FILES)
        files = [each for each in kept.rglob("*.gguf") if each.is_file()]
        return {str(each.relative_to(kept)): each.stat().st_size for each in files}
    info = _asked(repo_id, lambda: HfApi().model_info(repo_id, files_metadata=True))
    return {each.rfilename: each.size or 0 for each in info.siblings or ()}


def _download(repo_id: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        _asked(
            repo_id,
            lambda: snapshot_download(repo_id, allow_patterns=files, ignore_patterns=_NOT_FILES),
        )
    )


def _asked(repo_id: str, ask: Callable[[], Found]) -> Found:
    """What the hub answers. Raises ConfigError where it does not."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    missing = f"there is no directory {repo_id} here"
    try:
        return ask()
    except GatedRepoError:
        raise ConfigError(
            f"{repo_id} needs its owner's permission: accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{missing} and no such model on the hub; if it is private, set HF_TOKEN to a token "
            "that may read it"
        ) from None
    # Of the client's own errors, its transport's and the system's: they have no root in common.
    except Exception as cause:
        raise ConfigError(f"{missing}, and it cannot be had from the hub: {_why(cause)}") from None


def _why(cause: Exception) -> str:
    """One line that says what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, IncompleteSnapshotError

    response = cause.response if isinstance(cause, HfHubHTTPError) else None
    if response is not None and response.status_code in (401, 403):
        return (
            f"it answers {response.status_code}; look at the token in HF_TOKEN: is it valid, may "
            "it read this?"
        )
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk under {constants.HF_HUB_CACHE} is full; free some space, or set HF_HOME to "
            "another place"
        )
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{cause.filename or constants.HF_HUB_CACHE} cannot be written; set HF_HOME to a place "
            "that can"
        )
    if constants.HF_HUB_OFFLINE:
        kept = (
            "holds only a part of it"
            if isinstance(cause, IncompleteSnapshotError)
            else "does not have it"
        )
        return f"HF_HUB_OFFLINE is set, and the cache in {constants.HF_HUB_CACHE} {kept}"
    lines = [line.removeprefix("Got: ") for line in str(cause).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(cause).__name__} (is {constants.ENDPOINT} within reach?)"
