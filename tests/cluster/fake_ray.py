"""What RayCluster uses of Ray, without a cluster."""

from __future__ import annotations

import signal
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception):
    pass


class AuthenticationError(RayError):
    pass


class Reference:
    """What an actor's outcome will be: bytes, or an error."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.value: Any = None

    def end(self, value: Any) -> None:
        self.value = value
        self.ended.set()


class Group:
    def __init__(self, bundles: list[dict[str, float]], strategy: str) -> None:
        self.bundles = bundles
        self.strategy = strategy
        self.bundle_count = len(bundles)
        self.fits = True
        self.waited = 0.0
        self.removed = False

    def wait(self, seconds: float) -> bool:
        self.waited += seconds
        return self.fits


class Actor:
    def __init__(self, options: dict[str, Any], arguments: tuple[Any, ...]) -> None:
        self.options = options
        self.arguments = arguments
        self.outcomes: list[Reference] = []
        self.asked = threading.Semaphore(0)
        self.outcome = SimpleNamespace(remote=self._outcome)

    def _outcome(self) -> Reference:
        self.outcomes.append(Reference())
        self.asked.release()
        return self.outcomes[-1]


class FakeRay:
    """Stands for the library while a test lasts; what is set here is what Ray would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: Exception | None = None
        self.given: dict[str, Any] = {}
        self.cpus = {"10.0.0.1": 4, "10.0.0.2": 2}
        self.fits = True
        self.state = "CREATED"
        self.groups: list[Group] = []
        self.actors: list[Actor] = []
        self.killed: list[tuple[Actor, bool]] = []
        self.open = False
        self.silence = threading.Event()
        self.silence.set()
        for name, module in self._modules().items():
            monkeypatch.setitem(sys.modules, name, module)

    def _modules(self) -> dict[str, ModuleType]:
        ray = ModuleType("ray")
        parts = {
            "ray": ray,
            "ray.util": ModuleType("ray.util"),
            "ray.exceptions": ModuleType("ray.exceptions"),
            "ray.util.placement_group": ModuleType("ray.util.placement_group"),
            "ray.util.scheduling_strategies": ModuleType("ray.util.scheduling_strategies"),
        }
        vars(parts["ray.exceptions"]).update(
            RayError=RayError, AuthenticationError=AuthenticationError
        )
        vars(parts["ray.util"]).update(get_node_ip_address=lambda: "10.0.0.1")
        vars(parts["ray.util.placement_group"]).update(
            placement_group=self._group,
            placement_group_table=lambda group: {"state": self.state},
            remove_placement_group=lambda group: setattr(group, "removed", True),
        )
        vars(parts["ray.util.scheduling_strategies"]).update(
            PlacementGroupSchedulingStrategy=lambda group, rank: (group, rank)
        )
        context = SimpleNamespace(gcs_address="10.0.0.1:6379", get_node_id=lambda: "0123abcd" * 7)
        vars(ray).update(
            util=parts["ray.util"],
            exceptions=parts["ray.exceptions"],
            init=self._init,
            shutdown=lambda: setattr(self, "open", False),
            get_runtime_context=lambda: context,
            nodes=lambda: [
                {"Alive": alive, "NodeManagerAddress": at, "Resources": {"CPU": count}}
                for alive in (True, False)
                for at, count in self.cpus.items()
            ],
            remote=lambda kind: SimpleNamespace(options=self._options),
            wait=self._wait,
            get=self._get,
            kill=lambda actor, no_restart: self.killed.append((actor, no_restart)),
        )
        return parts

    def _init(self, **given: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has one of its own, too
        self.silence.wait(20)
        if self.fails is not None:
            raise self.fails
        self.given = given
        self.open = True

    def _group(self, bundles: list[dict[str, float]], strategy: str) -> Group:
        self.groups.append(Group(bundles, strategy))
        self.groups[-1].fits = self.fits
        return self.groups[-1]

    def _options(self, **options: Any) -> Any:
        def remote(*arguments: Any) -> Actor:
            self.actors.append(Actor(options, arguments))
            return self.actors[-1]

        return SimpleNamespace(remote=remote)

    def _wait(self, references: list[Reference], timeout: float) -> tuple[list[Reference], Any]:
        for reference in references:
            reference.ended.wait(timeout / 50)
        return [each for each in references if each.ended.is_set()], None

    def _get(self, reference: Reference) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value
