"""--config: a file's options, what wins over them, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moebius.cli.commands import app
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError
from moebius.server.settings import ServerSettings


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`serve` with a config file and arguments: what would be served, and by which options."""
    monkeypatch.delenv("MOEBIUS_API_KEY", raising=False)

    def run(text: str, *arguments: str) -> tuple[str, EngineConfig, ServerSettings, Any]:
        found: list[Any] = []
        monkeypatch.setattr("moebius.cli.serve._serve_on", lambda *given: found.append(given))
        monkeypatch.setattr("moebius.models.hub.find_model", lambda model, *_: model)
        path = tmp_path / "moebius.toml"
        path.write_text(text)
        result = CliRunner().invoke(app, ["serve", "--config", str(path), *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if not found:
            raise ConfigError(result.output)
        ((_, model, config, settings, options, _),) = found
        return model, config, settings, options

    return run


FILE = """
model = "of-the-file"
host = "127.0.0.1"
port = 0
max-num-seqs = 7
max_num_batched_tokens = 512
enable_prefix_caching = false
served_model_name = ["a", "b"]
api-key = ["secret"]

[bounds]
max_connections = 99
drain-timeout = 2.5
"""


def test_a_file_stands_for_options_that_are_not_given(serve) -> None:
    model, config, settings, options = serve(FILE)
    assert model == "of-the-file" and options.port == 0
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (7, 512)
    assert not config.enable_prefix_caching and config.enable_chunked_prefill
    assert settings.served_model_names == ("a", "b") and settings.api_keys == ("secret",)
    assert (settings.max_connections, settings.drain_timeout) == (99, 2.5)
    assert settings.request_timeout == 3600.0


def test_the_command_line_and_the_environment_win(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("of-the-line", "--max-num-seqs", "3", "--served-model-name", "c")
    model, config, settings, _ = serve(FILE, *arguments, "--enable-prefix-caching")
    assert model == "of-the-line" and config.max_num_seqs == 3
    assert config.enable_prefix_caching and settings.served_model_names == ("c",)
    assert config.max_num_batched_tokens == 512
    monkeypatch.setenv("MOEBIUS_API_KEY", "of-the-environment")
    assert serve(FILE)[2].api_keys == ("of-the-environment",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "has no option 'prot'; it may have activations, "),
        ("config = 'x'", "has no option 'config'"),
        ("help = true", "has no option 'help'"),
        ("max_num_seqs = 1.5", "max_num_seqs is 1.5: Input should be a valid integer"),
        ("max_num_seqs = true", "max_num_seqs is True; it must be a text or a number"),
        ("max_num_seqs = 0", "max_num_seqs is 0; it must be at least 1"),
        ("enable_prefix_caching = 'no'", "it must be true or false"),
        ("served_model_name = 'a'", "it must be a list of texts"),
        ("max_num_seqs = 1\nmax-num-seqs = 2", "says 'max_num_seqs' twice"),
        ("port = ", "is no TOML"),
        ("[bounds]\nmax_conections = 1", "[bounds] has no 'max_conections'; it may have request"),
        ("[bounds]\nmax_connections = 1.5", "must be an integer"),
        ("[bounds]\nmax_connections = 0", "max_connections is 0; it must be at least 1"),
        ("[bounds]\ndrain_timeout = 'x'", "must be a number"),
        ("[bounds]\nrequest_timeout = -1", "request_timeout"),
        ("bounds = 1", "[bounds] must be a table"),
        ("[server]\nport = 1", "has no option 'server'"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say_is_named(serve, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        serve(text, "--port", "0")
    assert said in " ".join(str(error.value).replace("│", " ").split())


def test_a_key_needs_a_certificate(serve) -> None:
    with pytest.raises(ConfigError, match="--tls-key needs --tls-cert"):
        serve("tls_key = 'key.pem'")
    with pytest.raises(ConfigError, match=r"none\.pem or its key None: No such file"):
        serve("tls_cert = 'none.pem'")
