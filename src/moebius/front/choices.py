"""A prompt's choices: each is a request of its own, which an engine gets a copy of."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

from moebius.engine.client import EngineInfo
from moebius.errors import RequestError
from moebius.front.assemble import SequenceAssembler
from moebius.front.constraints import ReplyRules, constraint_of
from moebius.request.constraint import Constraint
from moebius.request.engine_request import EngineRequest
from moebius.request.hashes import BlockHasher
from moebius.request.params import SamplingParams
from moebius.request.share import NOBODY, Share
from moebius.text import EncodedPrompt, Expected, ReplyFormat, Tokenizer


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a prompt: what was asked, which never changes, and what has come of it."""

    request: EngineRequest
    assembler: SequenceAssembler


@dataclass(frozen=True, slots=True)
class ChoiceOpener:
    """Makes the choices of prompts for an engine with these facts.

    hasher   the launch's: then a prompt's prefix hashes go to the engine with it; None: it makes
             them itself
    replies  how replies to chats are read; None: as the tokenizer tells
    """

    tokenizer: Tokenizer
    info: EngineInfo
    hasher: BlockHasher | None = None
    replies: ReplyFormat | None = None

    @property
    def format(self) -> ReplyFormat:
        """How replies to chats are read."""
        return self.replies or self.tokenizer.replies

    def open(
        self,
        prompt: EncodedPrompt,
        params: SamplingParams,
        ids: Iterator[str],
        *,
        continues: bool,
        arrival: float,
        priority: int = 0,
        deadline: float | None = None,
        salt: bytes = b"",
        expected: Expected | None = None,
        constraint: Constraint | None = None,
        share: Share = NOBODY,
    ) -> Iterator[Choice]:
        """The `params.n` choices of one prompt. Raises RequestError.

        The prompt is checked and hashed once, and all choices share it. `ids` names the requests. A
        seed that is given serves every prompt alike, so that an answer does not depend on the
        prompt's place in a call; where none is given each prompt draws its own. `continues`: the
        text continues the prompt's, unless an encoder reads that; else it replies to a chat, whose
        last message it may go on with, and is read for what that is made of, unless special tokens
        are wanted. `expected`: which tools such a reply may call. constraint: what its tokens are
        held to; None: to what the parameters ask for.
        """
        self._check_scores(params)
        if constraint is None:
            rules = None
            if not continues:
                rules = ReplyRules.of(self.format, prompt, expected or Expected())
            constraint = constraint_of(params, self.tokenizer, rules)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        first = EngineRequest.create(
            next(ids),
            prompt.ids,
            params.with_(structured=None, bad_words=()) if constraint else params,
            self.info.limits,
            arrival=arrival,
            eos_ids=self.info.eos_ids | prompt.end_ids,
            seed=choice_seed(seed, 0),
            priority=priority,
            deadline=deadline,
            salt=salt,
            share=share,
            generation_start=prompt.generation_start,
            hasher=self.hasher,
            constraint=constraint,
        )
        others = (first.sibling(next(ids), choice_seed(seed, i)) for i in range(1, params.n))
        alone = self.info.start_ids or not (continues or prompt.inside)
        context: Sequence[int] = () if alone else first.prompt_ids
        for request in chain((first,), others):
            reply = None
            if not continues and params.skip_special_tokens:
                reply = self.format.parser(prompt, expected or Expected(), request.id)
            yield Choice(
                request,
                SequenceAssembler(self.tokenizer, params, prompt_ids=context, reply=reply),
            )

    def _check_scores(self, params: SamplingParams) -> None:
        if self.info.start_ids and params.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs, and logprobs with echo, are not supported with this model: an "
                "encoder reads the prompt, and gives its tokens no probabilities",
                param="prompt_logprobs",
            )


def choice_seed(seed: int, index: int) -> int:
    """The 64-bit seed of choice `index` of a request with `seed`.

    Choices differ, and repeat from run to run.
    """
    data = (seed % 2**64).to_bytes(8, "little") + index.to_bytes(4, "little")
    return int.from_bytes(blake2b(data, digest_size=8, person=b"moebius-choice").digest(), "little")
