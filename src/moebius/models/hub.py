"""Where a model's files are: in a directory, in this package, or downloaded from the Hugging Face
hub."""

import errno
import re
from pathlib import Path

from moebius.errors import ConfigError

BUNDLED = "bundled"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
# What the hub allows: huggingface_hub refuses other names with errors of its own, and so does the
# hub.
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}/{_PART}")
# What is loaded, and what fine-tuning hands on.
_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "LICEN[CS]E*",
    "NOTICE*",
    "README.md",
]
# Copies of the same weights in another layout, and those of other models: twice the download.
_NOT_FILES = ["consolidated*.safetensors", "*/*.safetensors"]


def resolve_model(name: str) -> Path:
    """The directory of a model: an existing one, "bundled", or the local copy of a hub id such as
    org/name.

    A hub model is downloaded once (a progress bar shows it) and then served from the cache, offline
    too. Raises ConfigError saying what the name was taken for, what is wrong, and what would be
    right.
    """
    path = _local(name)
    if path is not None:
        return _with_config(path, name)
    if name == BUNDLED:
        path = Path(__file__).parent.parent / "bundled"
        if path.is_dir():
            return path
        raise ConfigError(
            "this installation carries no bundled model; name a model directory or a hub id "
            "(org/name)"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"there is no directory {name}; name a model directory, a hub id (org/name) or "
            f"{BUNDLED!r}"
        )
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{name!r} is neither a directory that is here nor a hub id (org/name, each of "
            "letters, digits, '-', '_' and '.', with neither '--' nor '..' in it nor '-' or '.' "
            f"at an end) nor {BUNDLED!r}"
        )
    return _with_config(_download(name), name)


def _local(name: str) -> Path | None:
    """The directory of that name, None where there is none."""
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return path
        if name and path.exists():
            raise ConfigError(
                f"{name} is a file; name the directory that holds config.json and the safetensors "
                "files"
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
        else "a model needs one, and safetensors files beside it"
    )
    raise ConfigError(f"{name} is there, but without a config.json; {hint}")


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    missing = f"there is no directory {repo_id} here"
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_FILES, ignore_patterns=_NOT_FILES))
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
            "holds a part of it only"
            if isinstance(cause, IncompleteSnapshotError)
            else "has it not"
        )
        return f"HF_HUB_OFFLINE is set, and the cache in {constants.HF_HUB_CACHE} {kept}"
    lines = [line.removeprefix("Got: ") for line in str(cause).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(cause).__name__} (is {constants.ENDPOINT} within reach?)"
