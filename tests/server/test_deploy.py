"""deploy/: what it says of the server is what the server has."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from moebius.cli.commands import app
from moebius.cli.config_file import bounds, read
from moebius.engine.client import ExpertLoads, LayerLoad
from moebius.server.keys import KeyRing
from moebius.server.settings import ServerSettings
from server.serving import Server, engine, run

DEPLOY = Path(__file__).parents[2] / "deploy"
# What PromQL adds: functions, keywords, and what stands in braces and brackets.
WORDS = {"sum", "max", "by", "rate", "histogram_quantile", "le"}


def test_each_query_of_the_dashboard_is_of_a_metric_that_is_exported() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert len(queries) > 20

    async def exported(server: Server) -> str:
        await server.complete(max_tokens=3)
        return (await server.http.get("/metrics")).text

    # One of a model with experts: each of its layers' loads is a metric.
    fake = engine("hello")
    layer = LayerLoad(3, 1, 8, 1.0, 0.0, 0.5, (), (7, 1), (7, 1))
    fake.expert_loads = lambda: ExpertLoads(5, (layer,))  # type: ignore[method-assign]
    text = run(exported, fake)
    for query in queries:
        bare = re.sub(r"\[[^]]*\]|by \([^)]*\)", "", query)
        for name in set(re.findall(r"[a-z][a-z0-9_]{3,}", bare)) - WORDS:
            assert re.search(rf"^(# TYPE )?{name}[ {{]", text, re.MULTILINE), (name, query)


def test_the_config_file_is_one_and_so_is_the_key_file() -> None:
    known = {option.name for option in get_command(app).commands["serve"].params}
    found = read(DEPLOY / "moebius.toml")
    assert set(found) - {"bounds"} <= known
    ServerSettings(("m",), **bounds(DEPLOY / "moebius.toml"))
    assert len(KeyRing((), DEPLOY / "keys.toml")) == 3


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "kubernetes.yaml"])
def test_the_time_to_stop_is_longer_than_the_drain(name: str) -> None:
    drain = bounds(DEPLOY / "moebius.toml")["drain_timeout"]
    text = (DEPLOY / name).read_text()
    for seconds in re.findall(r"(?:stop_grace_period|terminationGracePeriodSeconds): (\d+)", text):
        assert int(seconds) > drain
    assert "/health/" in text or name == "compose.yaml"


def test_the_unit_reloads_and_stops_as_the_server_does() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(DEPLOY / "moebius.service")
    service = unit["Service"]
    assert "-HUP" in service["ExecReload"] and service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > bounds(DEPLOY / "moebius.toml")["drain_timeout"]
    assert "serve --config" in service["ExecStart"]


def test_changed_keys_reach_a_pod() -> None:
    """What is mounted by subPath never changes: https://kubernetes.io/docs/concepts/storage/volumes/#using-subpath"""
    text = (DEPLOY / "kubernetes.yaml").read_text()
    pod = next(yaml.safe_load_all(text))["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert not any("subPath" in mount for mount in container["volumeMounts"])
    folders = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert folders["etc"] == str(Path(read(DEPLOY / "moebius.toml")["api_keys"]).parent)
    assert folders.keys() == {volume["name"] for volume in pod["volumes"]}


def test_nothing_that_was_built_here_gets_into_the_image() -> None:
    """A build folder knows the place of its sources, and CMake refuses it in another."""
    ignored = (DEPLOY.parent / ".dockerignore").read_text().split()
    kept_out = (".venv/", "build/", "dist/", "/models/", "/runs/", "__pycache__/", "*.so")
    assert set(kept_out) <= set((DEPLOY.parent / ".gitignore").read_text().split())
    assert all({line.strip("/"), f"**/{line.strip('/')}"} & set(ignored) for line in kept_out)
