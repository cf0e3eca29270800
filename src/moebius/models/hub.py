"""Where a model's files are: in a directory, in this package, or downloaded from the Hugging Face hub."""

import re
from pathlib import Path

from moebius.errors import ConfigError

BUNDLED = "bundled"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
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


def resolve_model(name: str) -> Path:
    """The directory of a model: an existing one, "bundled", or the local copy of a hub id such as org/name.

    A hub model is downloaded once (a progress bar shows it) and then served from the cache, offline too. Raises
    ConfigError saying what is wrong and what would be right.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name == BUNDLED:
        path = Path(__file__).parent.parent / "bundled"
        if path.is_dir():
            return path
        raise ConfigError("this installation carries no bundled model; name a model directory or a hub id (org/name)")
    if name and path.exists():
        raise ConfigError(f"{name} is a file; name the directory that holds config.json and the safetensors files")
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name!r} is neither a directory nor a hub id (org/name) nor {BUNDLED!r}")
    return _download(name)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_FILES))
    except GatedRepoError:
        raise ConfigError(
            f"{repo_id} needs its owner's permission: accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(f"there is no directory {repo_id} here and no such model on the hub") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as cause:
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise ConfigError(
            f"there is no directory {repo_id} here, the hub's cache has it not, and it cannot be downloaded: {reason}"
        ) from None
