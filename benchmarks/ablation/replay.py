"""A list of requests handed to an engine as they arrive, and what each step brings."""

import time
from collections import deque
from collections.abc import Sequence

from ablation.variants import Variant
from moebius.bench.metrics import Record
from moebius.bench.workload import Sample
from moebius.engine.client import StepOutput
from moebius.engine.engine import Engine
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request


class Replay:
    """Hands a request list to an engine on the engine's clock and notes what each step brings."""

    def __init__(
        self, engine: Engine, samples: Sequence[Sample], due: Sequence[float], variant: Variant
    ) -> None:
        self._engine = engine
        self._samples = samples
        self._due = due
        self._variant = variant
        self._start = engine.clock()
        self._waiting = deque(range(len(samples)))
        self.records = [Record(at, s.input_tokens) for at, s in zip(due, samples, strict=True)]
        self.tokens: list[list[int]] = [[] for _ in samples]
        self.most_running = 0
        self.most_blocks = 0
        self._filled = 0
        self._held = 0

    @property
    def now(self) -> float:
        return self._engine.clock() - self._start

    @property
    def fill(self) -> float:
        """Tokens in the cache over the slots held for them; sharing brings it above 1."""
        return self._filled / max(self._held, 1)

    def run(self) -> float:
        """Seconds until the last token."""
        while self._waiting or self._engine.has_work:
            self._admit()
            if not self._engine.has_work:
                time.sleep(max(self._due[self._waiting[0]] - self.now, 0))
                continue
            outputs = self._engine.step()
            now = self.now
            self._observe(outputs)
            for output in outputs:
                if output.error is not None:
                    raise output.error
                self._take(int(output.request_id.partition(".")[0]), output.token_ids, now)
        return self.now

    def _admit(self) -> None:
        """Hand over what has arrived; a static batch only to an idle engine, as far as it fits."""
        if not self._variant.batching and self._engine.has_work:
            return
        pool = self._engine.scheduler.pool
        seats = self._engine.scheduler.config.max_num_seqs
        room = pool.num_blocks
        while self._waiting and self._due[self._waiting[0]] <= self.now:
            sample = self._samples[self._waiting[0]]
            room -= pool.blocks_for(sample.input_tokens + sample.output_tokens)
            seats -= 1
            if not self._variant.batching and (seats < 0 or room < 0):
                return
            self._submit(self._waiting.popleft())

    def _submit(self, index: int) -> None:
        sample = self._samples[index]
        drawn = self.tokens[index]
        count = sample.output_tokens if self._variant.cached else 1
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        request = Request(
            EngineRequest.create(
                f"{index}.{len(drawn)}",
                (*sample.prompt, *drawn),
                params,
                self._engine.info.limits,
                arrival=self._start + self._due[index],
            )
        )
        self._engine.add(request)

    def _take(self, index: int, token_ids: Sequence[int], now: float) -> None:
        record = self.records[index]
        self.tokens[index] += token_ids
        record.arrivals += [now - record.start] * len(token_ids)
        record.output_tokens = len(self.tokens[index])
        record.e2el = now - record.start
        if not self._variant.cached and record.output_tokens < self._samples[index].output_tokens:
            self._submit(index)

    def _observe(self, outputs: Sequence[StepOutput]) -> None:
        stats = self._engine.stats()
        requests = self._engine.scheduler.requests
        ended = sum(output.finish_reason is not None for output in outputs)
        self.most_running = max(self.most_running, stats.running + ended)
        self.most_blocks = max(self.most_blocks, stats.used_blocks)
        self._held += stats.used_blocks * self._engine.info.block_size
        self._filled += sum(
            request.num_computed_tokens for request in requests.values() if any(request.tables)
        )
