"""Bodies of Ollama's API, and what they ask for in OpenAI's words."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from moebius.errors import RequestError
from moebius.server.protocol import Body

Json = dict[str, Any]

# What a text without a chat template is given where num_predict does not say: Ollama's old default.
_RAW_TOKENS = 128


def _without_tag(name: str | None) -> str | None:
    """Ollama's clients put a tag behind a name that has none."""
    return None if name is None else name.removesuffix(":latest")


class Options(BaseModel):
    """Sampling; what is about Ollama's own engine asks for nothing here."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    num_predict: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: Any = None
    num_keep: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    numa: Any = None
    use_mmap: Any = None
    low_vram: Any = None
    repeat_last_n: Any = None
    penalize_newline: Any = None

    def openai(self) -> Json:
        """The same under OpenAI's and vLLM's names."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
        found = {name: getattr(self, name) for name in (*names, *_PENALTIES)}
        found["repetition_penalty"] = self.repeat_penalty
        if self.num_predict is not None and self.num_predict >= 0:  # below: no end is set
            found["max_tokens"] = self.num_predict
        return {name: value for name, value in found.items() if value is not None}


_PENALTIES = ("presence_penalty", "frequency_penalty")


class OllamaBody(Body):
    """What chat and generate share."""

    model: Annotated[str | None, AfterValidator(_without_tag)] = None
    stream: bool = True
    options: Options = Field(default_factory=Options)
    format: Literal["json", ""] | Json | None = None
    think: bool | str | None = None
    keep_alive: Any = None

    @property
    def unloads(self) -> bool:
        """Whether nothing is asked but that the model be let go of."""
        return self.keep_alive in (0, "0", "0s")

    def openai(self) -> Json:
        """The fields that both have in OpenAI's words."""
        body: Json = {"model": self.model, "stream": self.stream, **self.options.openai()}
        if self.format == "json":
            body["response_format"] = {"type": "json_object"}
        elif self.format:
            schema = {"name": "format", "schema": self.format}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def thinking(self) -> Json:
        """How a chat's template is told whether to think."""
        if isinstance(self.think, str):
            return {"reasoning_effort": self.think}
        if self.think is None:
            return {}
        return {"thinking": {"type": "enabled" if self.think else "disabled"}}


class OllamaChat(OllamaBody):
    """POST /api/chat."""

    messages: list[Json] = Field(default_factory=list)
    tools: list[Json] | None = None

    def chat(self) -> Json:
        """The body of a chat."""
        messages = [_message(message, i) for i, message in enumerate(self.messages)]
        tools = {"tools": self.tools} if self.tools else {}
        return {**self.openai(), **self.thinking(), **tools, "messages": messages}


class OllamaGenerate(OllamaBody):
    """POST /api/generate."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: Literal[""] | None = None
    context: Annotated[list[Any], Field(max_length=0)] | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    raw: bool = False

    def chat(self) -> Json:
        """The body of a chat of one turn."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}]
        return {**self.openai(), **self.thinking(), "messages": messages}

    def completion(self) -> Json:
        """The body of a completion of the prompt as it is."""
        if self.system:
            raise RequestError(
                "system: a prompt that goes to the model as it is has none", param="system"
            )
        body = {"max_tokens": _RAW_TOKENS, **self.openai()}
        return {**body, "prompt": self.prompt, "suffix": self.suffix}


class OllamaShow(Body):
    """POST /api/show."""

    model: Annotated[str | None, AfterValidator(_without_tag)] = None
    name: Annotated[str | None, AfterValidator(_without_tag)] = None
    verbose: bool = False


def _message(message: Json, index: int) -> Json:
    """A message in OpenAI's form: only text, and a tool's name under its name."""
    if message.get("images"):
        at = f"messages[{index}].images"
        raise RequestError(f"{at}: only text is supported", param=at)
    found = dict(message)
    found.pop("images", None)
    tool = found.pop("tool_name", None)
    thought = found.pop("thinking", None)
    if tool is not None:
        found.setdefault("name", tool)
    if thought is not None:
        found.setdefault("reasoning_content", thought)
    return found
