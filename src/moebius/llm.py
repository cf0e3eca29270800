"""LLM: the offline front door.

Its engine computes in this process, on the caller's thread; several ranks do in processes of their
own, which end with it.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from os import PathLike
from typing import Any, Self

from moebius import logs
from moebius.cluster.engines import EngineProcesses
from moebius.engine.client import EngineClient, StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.disk_directory import launch_key
from moebius.engine.inline import InlineClient
from moebius.engine.interrupts import Uninterrupted
from moebius.engine.load import check_ranks, load_engine
from moebius.engine.supervisor import EngineProcess
from moebius.engine.wire import Launch
from moebius.errors import OverloadError, RequestError
from moebius.front.assemble import Delta
from moebius.front.choices import Choice, ChoiceOpener
from moebius.front.conversation import Conversation, Opening, ReasoningSettings
from moebius.front.results import RequestOutput
from moebius.front.sessions import Session, Sessions
from moebius.front.tools import choice_of, tools_of
from moebius.models.hub import ModelSource, find_model
from moebius.request.params import SamplingParams
from moebius.text import EncodedPrompt, Expected, load_text
from moebius.text.replies import Content, Event

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

_CLOSE_SECONDS = 5.0
_IDLE_SECONDS = 1.0
"""What an engine elsewhere says of itself may be some tenths of a second old."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt on its way, with the choices that are made of it."""

    index: int
    prompt: str | None
    choices: list[Choice]

    @property
    def priority(self) -> int:
        return self.choices[0].request.priority

    @property
    def finished(self) -> bool:
        return all(choice.assembler.finished for choice in self.choices)

    def output(self) -> RequestOutput:
        request = self.choices[0].request
        first = self.choices[0].assembler
        scored = None
        if request.params.prompt_logprobs is not None:
            # The first token has none before it that could have told how likely it is.
            scored = (None, *first.prompt_logprobs)
        return RequestOutput(
            request_id=str(self.index),
            prompt=self.prompt,
            prompt_token_ids=request.prompt_ids,
            prompt_logprobs=scored,
            outputs=tuple(choice.assembler.completion(i) for i, choice in enumerate(self.choices)),
            num_cached_tokens=first.num_cached_tokens,
            finished=True,
        )


class _Feed:
    """Hands jobs to an engine as fast as its queue empties, and takes what comes of them.

    most     so many choices are the engine's at once
    """

    def __init__(
        self, session: Session, client: EngineClient, jobs: Iterable[_Job], most: int
    ) -> None:
        self._session = session
        self._client = client
        self._most = most
        self._waiting = ((job, choice) for job in jobs for choice in job.choices)
        # What the engine was too full to take, and why, until there may be room again.
        self._again: deque[tuple[_Job, Choice]] = deque()
        self._refusal: OverloadError | None = None
        self._idle_since: float | None = None
        # What the engine has, by id of the request.
        self._live: dict[str, tuple[_Job, Choice]] = {}

    def deltas(
        self, between_steps: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[_Job, Delta]]:
        """What each step adds to a choice of a job, until all are done."""
        while True:
            between_steps()
            if self._refusal is None:
                self._submit()
            if not self._live and not self._again:
                return
            outputs = self._session.outputs()
            if not outputs and not self._live:
                self._expect_room()
            for step in outputs:
                taken = self._take(step)
                if taken is not None:
                    yield taken

    def _submit(self) -> None:
        while len(self._live) < self._most:
            found = self._again.popleft() if self._again else next(self._waiting, None)
            if found is None:
                return
            _, choice = found
            self._live[choice.request.id] = found
            self._session.submit(choice.request)

    def _expect_room(self) -> None:
        """All was refused: others' requests may make room, or have made it by now.

        OverloadError where the engine has refused it though there have been none for a while.
        """
        stats = self._client.stats()
        now = time.monotonic()
        if stats.running or stats.waiting:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif self._refusal is not None and now - self._idle_since > _IDLE_SECONDS:
            raise self._refusal
        self._refusal = None

    def _take(self, step: StepOutput) -> tuple[_Job, Delta] | None:
        request_id = step.request_id
        if request_id not in self._live:
            return None
        if isinstance(step.error, OverloadError):
            self._again.append(self._live.pop(request_id))
            self._refusal = step.error
            return None
        self._refusal = None
        self._idle_since = None
        job, choice = self._live[request_id]
        if step.finish_reason is not None:
            del self._live[request_id]
        delta = choice.assembler.push(step)
        if choice.assembler.wants_abort and step.finish_reason is None:
            self._session.abort(request_id)
            del self._live[request_id]
        return job, delta


class LLM:
    """A loaded model.

    model: a directory in the Hugging Face layout, a GGUF file, a hub id, or "bundled" for the small
    model in the package. file: which GGUF file of a directory or a hub id, by its name or a part of
    it. tokenizer: a directory, GGUF file or hub id with the one to use instead of the model's.
    tool_format: how the model writes tool calls, where "auto" does not find out (--tool-format).
    Options are the fields of EngineConfig. Raises UsageError before anything is allocated.
    Iterators that are not read to their end may wait while others are read: each gets its own
    outputs. What torch is set to in this process stays.

        llm = LLM()
        params = SamplingParams(temperature=0, max_tokens=64)
        for output in llm.generate(["def fibonacci(n):"], params):
            print(output.outputs[0].text)
    """

    def __init__(
        self,
        model: str | PathLike[str] | ModelSource = "bundled",
        *,
        file: str | None = None,
        tokenizer: str | None = None,
        tool_format: str = "auto",
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"LLM has no option {', '.join(unknown)}; it has file, tokenizer, tool_format, "
                f"{', '.join(EngineConfig.__dataclass_fields__)}"
            )
        self.config = EngineConfig(**options)
        if not isinstance(model, ModelSource):
            model = find_model(os.fspath(model), file, tokenizer)
        elif file is not None or tokenizer is not None:
            raise TypeError("a ModelSource names its file and tokenizer itself: see find_model")
        self.tokenizer, self.defaults = load_text(model.path, model.tokenizer)
        replies = self.tokenizer.replies.with_tools(tool_format)
        key = launch_key(self.config)
        self._engines: EngineProcesses | None = None
        self.client = self._start(model, key)
        info = self.client.info
        self._opener = ChoiceOpener(self.tokenizer, info, info.hasher(key), replies)
        self._sessions = Sessions(self.client)
        self._ids = count()

    def _start(self, model: ModelSource, key: bytes) -> EngineClient:
        """The engine on this thread, or one in a process for each rank."""
        if self.config.ranks == 1:
            own = self.tokenizer
            engine = load_engine(
                model.path,
                self.config,
                eos_ids=self.defaults.eos_ids,
                prefix_key=key,
                tokenizer=lambda: own,
            )
            return InlineClient(engine)
        check_ranks(model.path, self.config)
        message = Launch(
            str(model.path.absolute()),
            self.config,
            key,
            self.defaults.eos_ids,
            logs.level(),
            tokenizer="" if model.tokenizer is None else str(model.tokenizer.absolute()),
        )
        # That they cannot be started any more, all that is asked ends with: no reason to end here.
        self._engines = EngineProcesses(self.config.ranks, on_give_up=lambda: None)
        weakref.finalize(self, _close, self._engines)  # where nobody closes this
        try:
            return self._engines.launch(message)
        except BaseException:  # Ctrl-C among them
            self._engines.close()
            raise

    @classmethod
    def from_config(cls, model: str | ModelSource, config: EngineConfig) -> Self:
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
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking_token_budget: int | None = None,
        priority: int | Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: lists of {"role", "content"}. Needs a model with a
        chat template.

        continue_final_message: go on with the text of the last message, which is the assistant's,
        instead of adding one; outputs hold what is new. add_generation_prompt: whether an answer is
        begun; None: it is, unless the last message is continued.
        Tools and their choice are as in OpenAI's API; what each output's `tool_calls` are, the
        caller is to do. chat_template_kwargs: variables of the template, such as enable_thinking.
        thinking_token_budget: most tokens of reasoning, whose end is written for the model then.
        """
        many: list[Any] = (
            [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        )
        given = tools_of(tools)
        choice = choice_of(tool_choice, given)
        opening = Opening(add_generation_prompt, continue_final_message)
        variables = chat_template_kwargs or {}
        reasoning = ReasoningSettings(budget=thinking_token_budget)
        asked = (
            Conversation(
                each,
                given,
                choice,
                parallel_tool_calls,
                reasoning,
                variables=variables,
                opening=opening,
            )
            for each in many
        )
        jobs = map(
            self._chat_job, count(), asked, self._params(params, many), _priorities(priority, many)
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
        """Answer one conversation (n = 1) piece by piece, without its reasoning; closing the
        iterator aborts the rest."""
        for event in self.stream_events(messages, params):
            if isinstance(event, Content):
                yield event.text

    def stream_events(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[Event]:
        """The same with all that the reply is made of: see moebius.text.replies."""
        job = self._chat_job(0, Conversation(messages), params or self.default_params())
        if len(job.choices) > 1:
            raise RequestError(
                f"n is {len(job.choices)}; a stream has one choice, chat takes any n", param="n"
            )
        for _, delta in self._deltas([job]):
            yield from delta.events

    @property
    def processes(self) -> tuple[EngineProcess, ...]:
        """Those of the ranks, where there are several."""
        return () if self._engines is None else self._engines.processes

    def close(self) -> None:
        """Stop the engine. What is not read to its end yet ends with EngineError."""
        self.client.close(_CLOSE_SECONDS)
        if self._engines is not None:
            self._engines.close()

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
        return self._open(index, text, EncodedPrompt(ids), params, priority, continues=True)

    def _chat_job(
        self, index: int, chat: Conversation, params: SamplingParams, priority: int = 0
    ) -> _Job:
        replies = self._opener.format
        prompt = chat.prompt(self.tokenizer, replies)
        _check_params(params)
        return self._open(
            index,
            None,
            prompt,
            chat.params(params, replies),
            priority,
            continues=False,
            expected=chat.expected(replies),
        )

    def _open(
        self,
        index: int,
        text: str | None,
        prompt: EncodedPrompt,
        params: SamplingParams,
        priority: int,
        *,
        continues: bool,
        expected: Expected | None = None,
    ) -> _Job:
        _check_params(params)
        choices = self._opener.open(
            prompt,
            params,
            map(str, self._ids),
            continues=continues,
            arrival=time.monotonic(),
            priority=priority,
            expected=expected,
        )
        return _Job(index, text, list(choices))

    def _all(self, jobs: Iterable[_Job], total: int, progress: bool | None) -> list[RequestOutput]:
        # All of them, before the first one runs.
        checked = sorted(jobs, key=lambda job: job.priority)
        with Uninterrupted() as held:
            outputs = _with_progress(self._run(checked, held.run_noted), total, progress)
            return sorted(outputs, key=lambda output: int(output.request_id))

    def _run(
        self, jobs: Iterable[_Job], between_steps: Callable[[], None] = lambda: None
    ) -> Iterator[RequestOutput]:
        """Outputs come as soon as all of a job's choices are done."""
        for job, delta in self._deltas(jobs, between_steps):
            if delta.finish_reason is not None and job.finished:
                yield job.output()

    def _deltas(
        self, jobs: Iterable[_Job], between_steps: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[_Job, Delta]]:
        # As many as may run at once, and as many again, which wait.
        most = 2 * self.config.max_num_seqs * self.config.ranks
        with self._sessions.open() as session:
            yield from _Feed(session, self.client, jobs, most).deltas(between_steps)


def _close(engines: EngineProcesses) -> None:
    """Whose own threads may come to it, in the middle of anything: they collect garbage, too."""
    if threading.current_thread() is threading.main_thread():
        engines.close()
    else:
        threading.Thread(target=engines.close, name="close").start()


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


def _check_params(params: object) -> None:
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"params is {type(params).__name__}; it must be SamplingParams", param="params"
        )


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
