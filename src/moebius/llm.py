"""LLM: the offline front door, with the engine in this process and on this thread."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Self

from moebius.engine.client import StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.interrupts import Uninterrupted
from moebius.engine.load import load_engine
from moebius.engine.sessions import Session, Sessions
from moebius.errors import OverloadError, RequestError
from moebius.models.hub import resolve_model
from moebius.outputs import RequestOutput, SequenceAssembler, open_choices
from moebius.schedule.request import Request, SamplingParams
from moebius.text import GenerationDefaults, Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(slots=True)
class _Job:
    """One prompt on its way: its choices' requests and assemblers, which are filled step by
    step."""

    index: int
    prompt: str | None
    choices: list[tuple[Request, SequenceAssembler]]

    @property
    def finished(self) -> bool:
        return all(choice.finished for _, choice in self.choices)

    def output(self) -> RequestOutput:
        request, first = self.choices[0]
        return RequestOutput(
            request_id=str(self.index),
            prompt=self.prompt,
            prompt_token_ids=request.prompt_ids,
            # The first token has none before it that could have told how likely it is.
            prompt_logprobs=None
            if request.params.prompt_logprobs is None
            else (None, *first.prompt_logprobs),
            outputs=tuple(choice.completion(i) for i, (_, choice) in enumerate(self.choices)),
            num_cached_tokens=first.num_cached_tokens,
            finished=True,
        )


class LLM:
    """A loaded model.

    model: a directory in the Hugging Face layout, a hub id, or "bundled" for the small model in the
    package. Options are the fields of EngineConfig. Raises UsageError before anything is allocated.
    Iterators that are not read to their end may wait while others are read: each gets its own
    outputs. What torch is set to in this process stays.

        llm = LLM()
        for output in llm.generate(["def fibonacci(n):"], SamplingParams(temperature=0,
        max_tokens=64)):
            print(output.outputs[0].text)
    """

    def __init__(self, model: str = "bundled", **options: Any) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"LLM has no option {', '.join(unknown)}; it has "
                f"{', '.join(EngineConfig.__dataclass_fields__)}"
            )
        self.config = EngineConfig(**options)
        directory = resolve_model(model)
        self.tokenizer = Tokenizer.load(directory)
        self.defaults = GenerationDefaults.load(directory, self.tokenizer)
        self.engine = load_engine(directory, self.config, eos_ids=self.defaults.eos_ids)
        self._sessions = Sessions(self.engine)
        self._ids = count()

    @classmethod
    def from_config(cls, model: str, config: EngineConfig) -> Self:
        """The same from an EngineConfig that is there already."""
        return cls(model, **asdict(config))

    def default_params(self, **changes: Any) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json), with `changes` over them."""
        return SamplingParams(**{**self.defaults.sampling, **changes})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, each a text or a list of token ids; outputs come in the order of the
        prompts.

        params: one for all, or one each; None: the model's defaults. priority, likewise: lower is
        served first, under scheduling_policy="priority". progress None shows a bar when it takes
        long. Raises RequestError before anything is computed.
        """
        many: list[Any] = [prompts] if _is_one_prompt(prompts) else list(prompts)
        jobs = map(
            self._job, count(), many, self._params(params, many), _priorities(priority, many)
        )
        return self._all(jobs, len(many), progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: lists of {"role", "content"}. Needs a model with a
        chat template."""
        many: list[Any] = (
            [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        )
        jobs = map(
            self._chat_job, count(), many, self._params(params, many), _priorities(priority, many)
        )
        return self._all(jobs, len(many), progress)

    def stream(self, jobs: Iterable[tuple[Prompt, SamplingParams]]) -> Iterator[RequestOutput]:
        """Complete prompts from an iterator, which is read only as fast as the queue empties;
        outputs come as they finish, `request_id` is the prompt's number."""
        return self._run(
            self._job(index, prompt, params) for index, (prompt, params) in enumerate(jobs)
        )

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Answer one conversation (n = 1) piece by piece; closing the iterator aborts the rest."""
        [(request, choice), *others] = self._chat_job(
            0, messages, params or self.default_params()
        ).choices
        if others:
            raise RequestError(
                f"n is {1 + len(others)}; stream_chat has one choice, chat takes any n", param="n"
            )
        with self._sessions.open() as session:
            session.add(request)
            while not choice.finished:
                for step in session.outputs():
                    yield choice.push(step).text

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[Any]
    ) -> Sequence[SamplingParams]:
        return _each("params", self.default_params() if params is None else params, prompts)

    def _job(self, index: int, prompt: Prompt, params: SamplingParams, priority: int = 0) -> _Job:
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self._open(index, text, ids, params, continues=True, priority=priority)

    def _chat_job(
        self, index: int, messages: Sequence[Message], params: SamplingParams, priority: int = 0
    ) -> _Job:
        ids = self.tokenizer.encode_chat(messages)
        return self._open(index, None, ids, params, continues=False, priority=priority)

    def _open(
        self,
        index: int,
        prompt: str | None,
        ids: Sequence[int],
        params: SamplingParams,
        **request: Any,
    ) -> _Job:
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"params is {type(params).__name__}; it must be SamplingParams", param="params"
            )
        names, arrival = map(str, self._ids), self.engine.clock()
        choices = open_choices(
            self.tokenizer, self.engine.info, ids, params, names, arrival=arrival, **request
        )
        return _Job(index, prompt, list(choices))

    def _all(self, jobs: Iterable[_Job], total: int, progress: bool | None) -> list[RequestOutput]:
        # All of them, before the first one runs.
        checked = sorted(jobs, key=lambda job: job.choices[0][0].priority)
        with Uninterrupted() as held:
            outputs = _with_progress(self._run(checked, held.run_noted), total, progress)
            return sorted(outputs, key=lambda output: int(output.request_id))

    def _run(
        self, jobs: Iterable[_Job], between_steps: Callable[[], None] = lambda: None
    ) -> Iterator[RequestOutput]:
        """Feed the engine as fast as its queue empties; outputs come as soon as all of a job's
        choices are done."""
        waiting = ((job, request, choice) for job in jobs for request, choice in job.choices)
        following: tuple[_Job, Request, SequenceAssembler] | None = None
        live: dict[str, tuple[_Job, SequenceAssembler]] = {}
        with self._sessions.open() as session:
            while True:
                between_steps()
                while self.engine.scheduler.num_waiting <= self.config.max_num_seqs:
                    following = following or next(waiting, None)
                    if following is None or not self._add(session, following[1]):
                        break
                    job, request, choice = following
                    live[request.id], following = (job, choice), None
                if not live and following is None:
                    return
                for step in session.outputs():
                    yield from self._take(session, step, live)

    def _add(self, session: Session, request: Request) -> bool:
        """Whether the engine takes the request now; where it has no work, nothing could change
        that."""
        try:
            session.add(request)
        except OverloadError:
            if not self.engine.has_work:
                raise
            return False
        return True

    def _take(
        self, session: Session, step: StepOutput, live: dict[str, tuple[_Job, SequenceAssembler]]
    ) -> Iterator[RequestOutput]:
        if step.request_id not in live:
            return
        job, choice = live[step.request_id]
        if step.finish_reason is not None:
            del live[step.request_id]
        choice.push(step)
        if choice.wants_abort and step.finish_reason is None:
            session.abort(step.request_id)
            del live[step.request_id]
        if choice.finished and job.finished:
            yield job.output()


def _each(name: str, given: Any, prompts: Sequence[Any]) -> Sequence[Any]:
    """One value for each prompt: what was given, as it is where it is a sequence, and for all where
    it is not."""
    if not isinstance(given, Sequence):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise RequestError(
            f"{len(prompts)} prompts but {len(given)} {name}; give one for all, or one each",
            param=name,
        )
    return given


def _priorities(given: int | Sequence[int] | None, prompts: Sequence[Any]) -> Sequence[int]:
    return _each("priority", 0 if given is None else given, prompts)


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _with_progress(
    outputs: Iterator[RequestOutput], total: int, wanted: bool | None
) -> Iterator[RequestOutput]:
    """Show a bar for long runs on a terminal (wanted None), always (True) or never (False)."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not (console.is_terminal and total > 1 if wanted is None else wanted):
        yield from outputs
        return
    counts = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[rate]}"))
    tokens = 0
    with Progress(
        *Progress.get_default_columns(), *counts, console=console, transient=wanted is None
    ) as bar:
        task = bar.add_task("requests", total=total, rate="")
        for output in outputs:
            tokens += output.completion_tokens
            elapsed = bar.tasks[task].elapsed or 1e-9
            bar.update(task, advance=1, rate=f"{tokens / elapsed:,.0f} tokens/s")
            yield output
