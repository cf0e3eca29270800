"""LLM: the offline front door, with the engine in this process and on this thread."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from moebius.config import EngineConfig
from moebius.engine.client import StepOutput
from moebius.engine.load import load_engine
from moebius.errors import OverloadError, RequestError
from moebius.models.hub import resolve_model
from moebius.outputs import RequestOutput, SequenceAssembler
from moebius.schedule.request import Request, SamplingParams, choice_seed
from moebius.text import GenerationDefaults, Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(slots=True)
class _Job:
    """One prompt on its way: its choices' assemblers, filled step by step."""

    index: int
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    chat: bool
    choices: list[SequenceAssembler] = field(default_factory=list)
    pending: list[Request] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.choices) and all(choice.finished for choice in self.choices)

    def output(self) -> RequestOutput:
        first = self.choices[0]
        return RequestOutput(
            request_id=str(self.index),
            prompt=self.prompt,
            prompt_token_ids=tuple(self.prompt_ids),
            prompt_logprobs=None if self.params.prompt_logprobs is None else tuple(first.prompt_logprobs),
            outputs=tuple(choice.completion(i) for i, choice in enumerate(self.choices)),
            num_cached_tokens=first.num_cached_tokens,
            finished=True,
        )


class LLM:
    """A loaded model.

    model: a directory in the Hugging Face layout, a hub id, or "bundled" for the small model in the package. Options
    are the fields of EngineConfig. Raises UsageError before anything is allocated.

        llm = LLM()
        for output in llm.generate(["def fibonacci(n):"], SamplingParams(temperature=0, max_tokens=64)):
            print(output.outputs[0].text)
    """

    def __init__(self, model: str = "bundled", **options: Any) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"LLM has no option {', '.join(unknown)}; it has {', '.join(EngineConfig.__dataclass_fields__)}"
            )
        self._load(model, EngineConfig(**options))

    @classmethod
    def from_config(cls, model: str, config: EngineConfig) -> LLM:
        """The same from an EngineConfig that is there already."""
        llm = cls.__new__(cls)
        llm._load(model, config)
        return llm

    def _load(self, model: str, config: EngineConfig) -> None:
        self.config = config
        directory = resolve_model(model)
        self.tokenizer = Tokenizer.load(directory)
        self.defaults = GenerationDefaults.load(directory, self.tokenizer)
        self.engine = load_engine(directory, config, eos_ids=self.defaults.eos_ids)
        self._ids = count()

    def default_params(self, **changes: Any) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json), with `changes` over them."""
        return SamplingParams(**{**self.defaults.sampling, **changes})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, each a text or a list of token ids; outputs come in the order of the prompts.

        params: one for all, or one each; None: the model's defaults. progress None shows a bar when it takes long.
        Raises RequestError before anything is computed.
        """
        many: list[Any] = [prompts] if _is_one_prompt(prompts) else list(prompts)
        jobs = [
            self._job(index, prompt, one)
            for index, (prompt, one) in enumerate(zip(many, self._each(params, many), strict=True))
        ]
        return self._all(jobs, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: lists of {"role", "content"}. Needs a model with a chat template."""
        many: list[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        jobs = [
            _Job(index, None, self.tokenizer.encode_chat(conversation), one, chat=True)
            for index, (conversation, one) in enumerate(zip(many, self._each(params, many), strict=True))
        ]
        return self._all(jobs, progress)

    def stream(self, jobs: Iterable[tuple[Prompt, SamplingParams]]) -> Iterator[RequestOutput]:
        """Complete prompts from an iterator, which is read only as fast as the queue empties; outputs come as they
        finish, `request_id` is the prompt's number."""
        return self._run(self._job(index, prompt, params) for index, (prompt, params) in enumerate(jobs))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """Answer one conversation (n = 1) piece by piece; closing the iterator aborts the rest."""
        job = _Job(0, None, self.tokenizer.encode_chat(messages), params or self.default_params(), chat=True)
        self._prepare(job)
        request, choice = job.pending[0], job.choices[0]
        self.engine.add(request)
        try:
            while not choice.finished:
                for step in self.engine.step():
                    yield choice.push(step).text
        finally:
            self.engine.abort(request.id)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(
        self, params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[Any]
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(params)} params; give one for all, or one each", param="params"
            )
        return list(params)

    def _job(self, index: int, prompt: Prompt, params: SamplingParams) -> _Job:
        if isinstance(prompt, str):
            return _Job(index, prompt, self.tokenizer.encode(prompt), params, chat=False)
        return _Job(index, None, list(prompt), params, chat=False)

    def _all(self, jobs: list[_Job], progress: bool | None) -> list[RequestOutput]:
        for job in jobs:
            self._prepare(job)
        outputs: list[RequestOutput | None] = [None] * len(jobs)
        for output in _with_progress(self._run(jobs), len(jobs), progress):
            outputs[int(output.request_id)] = output
        return [output for output in outputs if output is not None]

    def _prepare(self, job: _Job) -> None:
        """Make the job's requests: the validated constructor sees all of them before the first one runs."""
        params = job.params
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        info = self.engine.info
        for choice in range(params.n):
            job.pending.append(
                Request.create(
                    f"{next(self._ids)}",
                    job.prompt_ids,
                    params,
                    info.limits,
                    arrival=self.engine.clock(),
                    eos_ids=info.eos_ids,
                    seed=choice_seed(seed, choice),
                )
            )
            continues = () if job.chat else job.prompt_ids
            job.choices.append(SequenceAssembler(self.tokenizer, params, prompt_ids=continues))

    def _run(self, jobs: Iterable[_Job]) -> Iterator[RequestOutput]:
        waiting = iter(jobs)
        live: dict[str, tuple[_Job, SequenceAssembler]] = {}
        current: _Job | None = None
        try:
            while True:
                current = self._feed(waiting, current, live)
                if not self.engine.has_work:
                    return
                for step in self.engine.step():
                    yield from self._take(step, live)
        finally:
            for request_id in list(live):
                self.engine.abort(request_id)

    def _feed(
        self, waiting: Iterator[_Job], current: _Job | None, live: dict[str, tuple[_Job, SequenceAssembler]]
    ) -> _Job | None:
        """Hand requests to the engine until its queue is full; returns the job that is not all in yet."""
        while self.engine.scheduler.num_waiting <= self.config.max_num_seqs:
            if current is None or not current.pending:
                current = next(waiting, None)
                if current is None:
                    return None
                if not current.choices:
                    self._prepare(current)
            request = current.pending[0]
            choice = current.choices[len(current.choices) - len(current.pending)]
            try:
                self.engine.add(request)
            except OverloadError:
                if not self.engine.has_work:
                    raise
                return current
            current.pending.pop(0)
            live[request.id] = (current, choice)
        return current

    def _take(self, step: StepOutput, live: dict[str, tuple[_Job, SequenceAssembler]]) -> Iterator[RequestOutput]:
        if step.request_id not in live:
            return
        job, choice = live[step.request_id]
        if step.finish_reason is not None:
            del live[step.request_id]
        choice.push(step)
        if choice.wants_abort and step.finish_reason is None:
            self.engine.abort(step.request_id)
            del live[step.request_id]
        if choice.finished and job.finished and not job.pending:
            yield job.output()


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _with_progress(outputs: Iterator[RequestOutput], total: int, wanted: bool | None) -> Iterator[RequestOutput]:
    """Show a bar for long runs on a terminal (wanted None), always (True) or never (False)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not (console.is_terminal and total > 1 if wanted is None else wanted):
        yield from outputs
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    tokens = 0
    with Progress(*columns, console=console, transient=wanted is None) as bar:
        task = bar.add_task("requests", total=total, rate="")
        for output in outputs:
            tokens += output.completion_tokens
            elapsed = bar.tasks[task].elapsed or 1e-9
            bar.update(task, advance=1, rate=f"{tokens / elapsed:,.0f} tokens/s")
            yield output
