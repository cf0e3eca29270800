"""What an operator chooses about an engine. Names are vLLM's where the meaning is the same."""

from dataclasses import dataclass
from typing import Annotated, Literal

from moebius.errors import ConfigError, require, require_seconds, require_word
from moebius.schedule.config import SchedulerConfig

Dtype = Literal["auto", "bfloat16", "float32"]
KVCacheDtype = Literal["auto", "bfloat16", "float32", "int8"]
Device = Literal["auto", "cpu", "cuda"]
Activations = Literal["int8", "float"]
SwitchCapacity = Literal["published", "none"]
Speculative = Literal["none", "ngram"]


@dataclass(frozen=True, slots=True)
class EngineConfig(SchedulerConfig):
    """The scheduler's options, and where and in what the model is computed."""

    dtype: Annotated[
        Dtype,
        "What is computed in: auto (the checkpoint's; float32 for float16 on a CPU), bfloat16 or "
        "float32. Weights stay as stored where it holds them exactly.",
    ] = "auto"
    quantization: Annotated[
        str | None,
        "Hold the weights in fewer bits: q8_0, q6_k, q5_k_m, q4_k_m or mxfp4. They are made at the "
        "first start and kept in a cache.",
    ] = None
    activations: Annotated[
        Activations,
        "What activations become where they meet quantised weights: int8 (fast, and the same bits "
        "on every CPU) or float (they stay as they are; slower).",
    ] = "int8"
    kv_cache_dtype: Annotated[
        KVCacheDtype,
        "What the KV cache is held in: auto (what is computed in), or int8: half of bfloat16's "
        "memory, and a little less exact.",
    ] = "auto"
    device: Annotated[Device, "auto (cuda when torch has it), cpu or cuda."] = "auto"
    experts: Annotated[
        int | str,
        "Where a router's experts lie and are computed: device; cpu: in the host's memory beside a "
        "CUDA device, by the CPU's kernels; or how many of each layer's on the device, and the "
        "others so: a number, or auto: as many as there is room for. They are the first ones, or "
        "the busiest by --expert-placement FILE. --experts-on-gpu is the same.",
    ] = "device"
    kv_cache_memory_bytes: Annotated[
        int | None, "What the KV cache reserves; default: see `moebius plan`."
    ] = None
    kv_cache_disk: Annotated[
        str | None,
        "Directory, of nobody else's, that keeps what requests leave of the KV cache: it is found "
        "again after a restart. Needs --kv-cache-disk-bytes.",
    ] = None
    kv_cache_disk_bytes: Annotated[int | None, "Most bytes that it takes, of all ranks."] = None
    step_deadline: Annotated[float, "Seconds after which a step without progress is a failure."] = (
        120.0
    )
    threads: Annotated[
        int | None, "Compute threads; default: one per core, as far as a CPU quota goes."
    ] = None
    ranks: Annotated[
        int,
        "Engines, a process each, that share the model's experts. Each serves requests of its own.",
    ] = 1
    expert_placement: Annotated[
        str,
        "Which rank holds which experts: linear (in order), balanced (placed again by measured "
        "load, while serving), or a file with loads: report.json of moebius inspect, or an answer "
        "of GET /v1/moe/stats.",
    ] = "linear"
    spare_experts: Annotated[
        int,
        "Replicas of experts that a rank holds of each layer. They even out loads; where the other "
        "ranks have every expert, they go on at once when one is lost.",
    ] = 0
    mmap_cold: Annotated[
        bool,
        "Let experts be read from disk as they are needed: for a model larger than the memory.",
    ] = False
    switch_capacity: Annotated[
        SwitchCapacity,
        "Of Switch Transformers, how many of a prompt's tokens an encoder's expert takes: "
        "published (expert_capacity of config.json; those beyond pass it by) or none (all).",
    ] = "published"
    speculative: Annotated[
        Speculative,
        "ngram: guess tokens from what a text has said before, and verify several in a step, where "
        "that pays. No token changes. none: draw one at a time.",
    ] = "none"
    trace: Annotated[
        str | None, "File that every scheduling decision is written to, as JSON lines."
    ] = None

    def __post_init__(self) -> None:
        SchedulerConfig.__post_init__(self)  # slots and super() do not go together in a dataclass
        require_word("dtype", self.dtype, Dtype)
        require_word("activations", self.activations, Activations)
        require_word("kv_cache_dtype", self.kv_cache_dtype, KVCacheDtype)
        require_word("device", self.device, Device)
        require_word("switch_capacity", self.switch_capacity, SwitchCapacity)
        require_word("speculative", self.speculative, Speculative)
        require_seconds("step_deadline", self.step_deadline)
        self._check_disk()
        self._check_experts()
        if not isinstance(self.ranks, int) or self.ranks < 1:
            raise ConfigError(f"ranks is {self.ranks!r}; it must be a number of at least 1")
        if self.ranks > 1 and self.speculative != "none":
            raise ConfigError(
                f"speculative is {self.speculative!r}, but ranks are {self.ranks}: what a step "
                "costs depends on all of them, and whether drafts pay is not known; leave one out"
            )
        if not self.expert_placement:
            raise ConfigError("expert_placement is empty; use linear, balanced, or a file")
        by_loads = self.device_experts not in (None, 0) and self.expert_placement != "balanced"
        for name in ("spare_experts",) if by_loads else ("expert_placement", "spare_experts"):
            if self.ranks == 1 and getattr(self, name) not in ("linear", 0):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, but one rank holds all experts; set ranks"
                )

    @property
    def device_experts(self) -> int | Literal["auto"] | None:
        """How many of each layer's experts lie on a device with memory of its own; None: all."""
        if self.experts == "device":
            return None
        if self.experts == "cpu":
            return 0
        return "auto" if self.experts == "auto" else int(self.experts)

    def _check_experts(self) -> None:
        given = str(self.experts)
        if given not in ("device", "cpu", "auto") and not (given.isascii() and given.isdecimal()):
            raise ConfigError(
                f"experts is {self.experts!r}; it must be device, cpu, auto, or how many of each "
                "layer's experts lie on the device, a whole number of at least 0"
            )
        if self.device_experts is None:
            return
        what = f"experts is {self.experts!r}, which puts some in the host's memory"
        if self.device == "cpu":
            raise ConfigError(
                f"{what} beside a CUDA device, but device is 'cpu': there all of the model is "
                "computed in the host's memory; leave it out, or use another device"
            )
        if self.ranks > 1:
            raise ConfigError(
                f"{what} beside a CUDA device, but ranks are {self.ranks}, which share experts on "
                "CPUs only; leave one out"
            )

    def _check_disk(self) -> None:
        require(
            (self.kv_cache_disk is None) == (self.kv_cache_disk_bytes is None),
            "kv_cache_disk and kv_cache_disk_bytes go together: name a directory, and how many "
            "bytes it may take",
        )
        if self.kv_cache_disk is not None:
            require(self.kv_cache_disk != "", "kv_cache_disk is empty; name a directory")
            require(
                self.enable_prefix_caching,
                "kv_cache_disk is a part of the prefix cache, and enable_prefix_caching is off",
            )
