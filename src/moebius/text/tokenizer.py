"""Tokenizer: a model directory's tokenizer.json and what stands beside it, as one object."""

import codecs
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence, Set
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Self

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from moebius.errors import ContextExceededError, RequestError, TokenizerError
from moebius.files import read_json, read_text
from moebius.text.bound import TokenBound
from moebius.text.chat import ChatTemplate, load_templates, normalise_messages
from moebius.text.continuation import Opened, opened_chat
from moebius.text.detokenize import Detokenizer
from moebius.text.prompts import EncodedPrompt, GenerationPrompts, RenderedChat
from moebius.text.replies import ReplyFormat, Vocabulary
from moebius.text.special_tokens import Rename, SpecialGuard, sentinels, strings_in
from moebius.text.tokenizer_config import add_tokens, special_tokens

# From so many characters on, a chat is rendered once to see whether it fits, before it is marked.
_LONG_CHAT = 2**17


def read_tokenizer_json(path: Path) -> Backend:
    """The tokenizers library's object from a file, which a byte order mark may begin.

    Raises TokenizerError.
    """
    try:
        with path.open("rb") as file:
            marked = file.read(3) == codecs.BOM_UTF8
        return Backend.from_str(read_text(path)) if marked else Backend.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"{path} cannot be read: {error}") from error


class Tokenizer:
    """Text to ids, ids to text, messages to ids. Safe to share between threads.

    vocab_size       the largest id + 1 (a model's logits may be wider)
    bos_id, eos_id   None where the tokenizer names none
    end_ids          all that end a text, eos_id among them
    special_ids      what `decode` skips: special tokens, but not T5's sentinels, which are what a
                     model of gaps in a text answers with
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, Any] | None = None,
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        templates: Mapping[str, ChatTemplate] | None = None,
        end_ids: Set[int] = frozenset(),
        rename: Rename | None = None,
    ) -> None:
        """Of a backend, and what stands beside it in a model directory or a GGUF file.

        special_tokens    name to text, as in special_tokens_map.json
        add_bos, add_eos  at a text's ends, where the backend does not
        end_ids           those that end a text besides the EOS of special_tokens
        rename            makes the backend's model with other names for some tokens, where that is
                          faster than taking it apart
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._templates = dict(templates or {})
        self._facts = {}
        for name, template in self._templates.items():
            self._facts[name] = template.probe(self._special_tokens)
        added = backend.get_added_tokens_decoder()
        self._special_texts = {i: token.content for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._special_texts) - sentinels(backend, self._special_texts)
        vocab = backend.get_vocab(with_added_tokens=False)  # once: a large one takes its time
        self.vocab_size = max([*vocab.values(), *added], default=-1) + 1
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self.detokenizer = Detokenizer(backend, decoder, self.special_ids)
        self._added_ids = {token.content: i for i, token in added.items()}
        self.replies = ReplyFormat(
            Vocabulary(self._added_ids, self.templates, self.token_text, self._encode_marked)
        )
        """How replies to chats are read."""
        own_end = () if self.eos_id is None else (self.eos_id,)
        self.end_ids = frozenset(end_ids).union(own_end, self.replies.end_ids)
        self._guard = SpecialGuard(backend, vocab, rename)
        self._bound = TokenBound(backend, vocab)
        self._generation_prompts = GenerationPrompts()
        self.opening, self._ending = self._frame(add_bos, add_eos)
        """The ids that go before a text, and behind it."""

    @classmethod
    def load(
        cls, directory: Path | str, templates: Mapping[str, ChatTemplate] | None = None
    ) -> Self:
        """Read a model directory.

        templates: chat templates for one that has none. Raises TokenizerError, or ConfigError for
        broken JSON, saying what is wrong.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{directory} has no tokenizer.json; make one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        backend = read_tokenizer_json(path)
        config = read_json(directory / "tokenizer_config.json", default={})
        names = read_json(directory / "special_tokens_map.json", default={})
        # As in transformers: the older file counts for more, but where the newer lists its tokens
        # by id.
        names = {**names, **config} if "added_tokens_decoder" in config else {**config, **names}
        specials = special_tokens(names)
        add_tokens(backend, config, specials)
        return cls(
            backend,
            specials,
            add_bos=config.get("add_bos_token") is True,
            add_eos=config.get("add_eos_token") is True,
            templates=load_templates(directory, config) or templates,
        )

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _frame(self, add_bos: bool, add_eos: bool) -> tuple[list[int], list[int]]:
        """The ids that go before and behind a text: the post-processor's, else the flags'.

        As in transformers 5, a flag that is false takes nothing from what tokenizer.json adds.
        """
        some = (self._backend.id_to_token(i) or "" for i in range(100))
        probes = chain(("a",), some)
        probe = next((text for text in probes if _encoded(self._backend, text)), "")
        plain = _encoded(self._backend, probe)
        framed = self._backend.encode(probe, add_special_tokens=True).ids
        start = next(i for i in range(len(framed) + 1) if framed[i : i + len(plain)] == plain)
        prefix = framed[:start]
        suffix = framed[start + len(plain) :]
        if add_bos and not prefix and self.bos_id is not None:
            prefix = [self.bos_id]
        if add_eos and not suffix and self.eos_id is not None:
            suffix = [self.eos_id]
        return prefix, suffix

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @property
    def templates(self) -> dict[str, str]:
        """The chat templates' texts by name; the plain one is `default`."""
        return {name: template.source for name, template in self._templates.items()}

    @property
    def text(self) -> str:
        """What tokenizer.json would hold, with all that was added to it."""
        text: str = self._backend.to_str()
        return text

    @property
    def definition(self) -> dict[str, Any]:
        """The same as an object."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    def fingerprint(self) -> str:
        """16 hex digits that tell it from another one by all but its chat templates, wherever it
        was read from."""
        said = (self._special_tokens, self.opening, self._ending)
        digest = blake2b(self.text.encode(), digest_size=8, person=b"moebius-text")
        digest.update(json.dumps(said, sort_keys=True).encode())
        return digest.hexdigest()

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary calls this; None where there is none."""
        return self._backend.token_to_id(text)

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name, such as pad_token; None where there is none."""
        return self._id_of(name)

    def added_id(self, text: str) -> int | None:
        """The id of a token that was added to the vocabulary, by its text."""
        return self._added_ids.get(text)

    def fewest_tokens(self, text: str) -> int:
        """At least so many ids `encode` makes of a text, known without tokenising; 0: unknown."""
        return self._bound.fewest(text)

    def encode(
        self, text: str, add_special_tokens: bool = True, *, at_most: int | None = None
    ) -> list[int]:
        """Ids of a text, in which the text of special tokens becomes special tokens.

        Raises RequestError(param="prompt") on text that is not Unicode (a lone surrogate), and
        ContextLengthError on text of more than `at_most` tokens: before tokenising where its size
        alone tells so.
        """
        _check_unicode(text, "prompt")
        self.check_size(text, at_most, "prompt")
        ids = _encoded(self._backend, text, at_most, "prompt")
        return self.framed(ids) if add_special_tokens else ids

    def framed(self, ids: list[int]) -> list[int]:
        """The ids of a text with those that go before and behind any."""
        return [*self.opening, *ids, *self._ending]

    def _encode_marked(self, text: str) -> list[int]:
        """Ids of what the model's own format says, special tokens included."""
        return self.encode(text, add_special_tokens=False)

    def offsets(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Where in the text each id that `encode` makes of it begins, in characters.

        What normalising changes is counted as it stands in the text. A character of several tokens
        begins them all. What no token stands for, such as a space that is dropped, belongs to the
        next one, but an accent that was composed with its letter to the letter's.
        """
        # The library's fast way has no offsets.
        encoding = _library(self._backend.encode_batch, text, "prompt")
        found: list[int] = []
        end = 0
        for start, stop in encoding.offsets:
            while end < start and unicodedata.category(text[end]).startswith("M"):
                end += 1
            found.append(min(start, end))
            end = max(end, stop)
        if not add_special_tokens:
            return found
        return [*[0] * len(self.opening), *found, *[len(text)] * len(self._ending)]

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which special-token text is plain text; nothing is added."""
        _check_unicode(text, "prompt")
        if not self._guard.concerns(text):
            return self.encode(text, False)
        return self._guard.original(_encoded(self._guard.backend, text))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        *,
        continue_final_message: bool = False,
        at_most: int | None = None,
    ) -> list[int]:
        """Ids of a chat.

        Special tokens are the template's alone: their text in messages, tools and variables is
        plain. `variables` are further ones for the template (enable_thinking, ...). Nothing is
        added to what the template writes, so never a second BOS. With continue_final_message the
        ids end inside the last message. Raises RequestError naming the message, or "messages" where
        the template is missing or refuses; ContextLengthError beyond `at_most` tokens, as `encode`
        does.
        """
        opened = opened_chat(messages, continue_final_message, add_generation_prompt)
        chat = self._chat(messages, tools, variables, add_generation_prompt, at_most, opened)
        return self._chat_ids(chat.rendered, chat.marker, at_most)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        at_most: int | None = None,
    ) -> EncodedPrompt:
        """What `encode_chat` makes of a chat that is to be answered, and where in it the generation
        prompt begins.

        add_special_tokens: begin it as any text is begun (BOS), unless the template does so itself.
        """
        opened = opened_chat(messages, continue_final_message, add_generation_prompt)
        chat = self._chat(messages, tools, variables, add_generation_prompt, at_most, opened)
        ids = self._chat_ids(chat.rendered, chat.marker, at_most)
        start = None
        if add_generation_prompt:
            start = self._generation_prompts.start(
                chat, ids, lambda text: self._chat_ids(text, chat.marker, None)
            )
        if add_special_tokens and ids[: len(self.opening)] != self.opening:
            ids = [*self.opening, *ids]
            start = None if start is None else start + len(self.opening)
        return EncodedPrompt(ids, start, inside=opened is not None)

    def _chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        add_generation_prompt: bool,
        at_most: int | None,
        opened: Opened | None = None,
    ) -> RenderedChat:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._template(name)
        shown_messages = normalise_messages(messages, self._facts[name])
        # Everything in the chat that is not the operator's.
        chat = {
            "documents": None,
            **(variables or {}),
            "messages": shown_messages if opened is None else opened.marked(shown_messages),
            "tools": list(tools) if tools else None,
        }
        if chat.get("documents") and "documents" not in template.reads:
            raise RequestError(
                "documents: the model's chat template takes none; put them into a message",
                param="documents",
            )
        length = 0
        for text in strings_in(chat):
            _check_unicode(text, "messages")
            length += len(text)
        known = {**self._special_tokens, "add_generation_prompt": add_generation_prompt}
        if length > _LONG_CHAT:
            self.check_size(template.render({**chat, **known}), at_most, "messages")
        marked, marker = self._guard.mark(chat)
        shown = {**marked, **known}
        kind = None if variables or tools or not messages else (name, str(messages[-1].get("role")))
        rendered = template.render(shown)
        if opened is not None:
            rendered = opened.cut(rendered)
        return RenderedChat(template, shown, marker, rendered, kind)

    def _chat_ids(self, rendered: str, marker: str | None, at_most: int | None) -> list[int]:
        if marker is None:
            self.check_size(rendered, at_most, "messages")
            return _encoded(self._backend, rendered, at_most, "messages")
        self.check_size(rendered.replace(marker, ""), at_most, "messages")
        ids = _encoded(
            self._guard.backend, self._guard.named(rendered, marker), at_most, "messages"
        )
        return self._guard.original(ids)

    def _template(self, name: str) -> ChatTemplate:
        template = self._templates.get(name)
        if template is None:
            has = ""
            if self._templates:
                has = f"; it has templates {sorted(self._templates)} but no default"
            raise RequestError(
                f"this model has no chat template{has}; use /v1/completions", param="messages"
            )
        return template

    def check_size(self, text: str, at_most: int | None, param: str) -> None:
        """ContextLengthError, naming `param`, where a text's size alone tells that it has more than
        `at_most` tokens."""
        if at_most is None:
            return
        fewest = self.fewest_tokens(text)
        if fewest > at_most:
            raise ContextExceededError(at_most, fewest, at_least=True, param=param)

    def spelling(self, token_id: int) -> str | None:
        """What the vocabulary calls a token; None for an id without one."""
        return self._backend.id_to_token(token_id)

    def split_special(self, text: str) -> list[str]:
        """The text as ordinary and special pieces in turn: see SpecialGuard.split."""
        return self._guard.split(text)

    def special_text(self, token_id: int) -> str:
        """A special token as `split_special` spells it; KeyError for any other."""
        return self._special_texts[token_id]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; those without a token have none, and what is no UTF-8 is U+FFFD."""
        text = self.detokenizer.join(ids, skip_special=skip_special_tokens)
        return text.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes inside a text, special ones included; b"" for an unknown id."""
        return self.detokenizer.own(token_id)

    def token_text(self, token_id: int) -> str:
        """The token's own text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def _encoded(
    backend: Backend, text: str, at_most: int | None = None, param: str = "prompt"
) -> list[int]:
    encoding = _library(backend.encode_batch_fast, text, param)
    if at_most is not None and len(encoding) > at_most:
        raise ContextExceededError(at_most, len(encoding), param=param)
    ids: list[int] = encoding.ids
    return ids


def _library(encode_batch: Callable[..., list[Encoding]], text: str, param: str) -> Encoding:
    """One text through one of the library's functions for batches.

    Only these let other threads run meanwhile.
    """
    try:
        return encode_batch([text], add_special_tokens=False)[0]
    except BaseException as error:  # a panic in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RequestError(
            f"{param}: the tokenizer cannot encode this text: {error}", param=param
        ) from error


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param}: the text holds a lone surrogate at position {error.start}; it must be valid "
            "Unicode",
            param=param,
        ) from error
