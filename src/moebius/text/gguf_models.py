"""The tokenizers library's models, made of a GGUF file's vocabulary."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import groupby

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from moebius.errors import TokenizerError
from moebius.text.gguf_values import PREFIX, shown, strings
from moebius.text.gguf_vocabulary import ADVICE, Kind, Vocabulary
from moebius.text.special_tokens import Rename

Merge = tuple[str, str]

ADDED = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
"""The kinds of tokens that are found in a text before it is cut; the last is no special token."""


@dataclass(frozen=True, slots=True)
class Built:
    """A backend, still without normaliser, pre-tokenizer and decoder.

    rename   makes its model once more, with other names for some tokens
    """

    backend: Backend
    rename: Rename


def bpe(
    vocabulary: Vocabulary,
    merges: list[Merge],
    rstrip: Set[int] = frozenset(),
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> Built:
    """A BPE model with these merges, and the added tokens around it.

    Added tokens that end the vocabulary stay out of the model where its merges let them: then no
    plain text can become one of them. Unused tokens at the very end stay out in any case.

    rstrip   the added tokens that take the white space behind them
    """

    def model(vocab: Mapping[str, int], merges: list[Merge], unknown: str | None) -> models.BPE:
        return models.BPE(
            dict(vocab),
            merges,
            unk_token=unknown,
            fuse_unk=unknown is not None,
            byte_fallback=byte_fallback,
            ignore_merges=ignore_merges,
        )

    sizes = _sizes(vocabulary, unk_token)
    for size in sizes:
        vocab = {token: i for i, token in enumerate(vocabulary.tokens[:size])}
        try:
            backend = Backend(model(vocab, merges, unk_token))
            break
        except Exception as error:  # the tokenizers library raises bare Exception
            if size == sizes[-1]:
                raise _misnamed(merges, vocab, error) from error
    add_tokens(backend, vocabulary, rstrip)

    def rename(names: Mapping[str, str]) -> models.Model:
        renamed = {names.get(token, token): i for token, i in vocab.items()}
        gone = names.keys()
        kept = [(a, b) for a, b in merges if gone.isdisjoint((a, b, a + b))]
        return model(renamed, kept, unk_token and names.get(unk_token, unk_token))

    return Built(backend, rename)


def _sizes(vocabulary: Vocabulary, unk_token: str | None) -> list[int]:
    """How many tokens may be the model's own: first without the added ones at the end."""
    normal = max(vocabulary.of_kind(Kind.NORMAL, Kind.BYTE), default=-1) + 1
    behind = [i for i in vocabulary.of_kind(*ADDED) if i >= normal]
    whole = max([normal, *(i + 1 for i in behind)])
    # The library numbers tokens that it does not know from the model's size on.
    in_order = behind == list(range(normal, whole))
    if normal == whole or not in_order or unk_token in vocabulary.tokens[normal:]:
        return [whole]
    return [normal, whole]


def _misnamed(merges: list[Merge], vocab: Mapping[str, int], cause: Exception) -> TokenizerError:
    for i, (left, right) in enumerate(merges):
        for part in (left, right, left + right):
            if part not in vocab:
                return TokenizerError(
                    f"{PREFIX}merges[{i}] joins {shown(left)} and {shown(right)}, but "
                    f"{shown(part)} is no token"
                )
    return TokenizerError(f"{PREFIX}merges: {cause}")


def add_tokens(backend: Backend, vocabulary: Vocabulary, rstrip: Set[int] = frozenset()) -> None:
    """Have the added tokens found in a text before it is normalised or cut."""
    kinds = vocabulary.kinds
    ids: Iterable[int] = vocabulary.of_kind(*ADDED)
    for special, run in groupby(ids, lambda i: kinds[i] != Kind.USER_DEFINED):
        batch = [
            AddedToken(vocabulary.tokens[i], normalized=False, special=special, rstrip=i in rstrip)
            for i in run
        ]
        if special:
            backend.add_special_tokens(batch)
        else:
            backend.add_tokens(batch)


def unigram(vocabulary: Vocabulary) -> Built:
    """A unigram model, and the added tokens around it."""
    if vocabulary.scores is None:
        raise TokenizerError(f"{PREFIX}scores is missing; {ADVICE}")
    scores = [
        0.0 if kind == Kind.USER_DEFINED else score
        for kind, score in zip(vocabulary.kinds, vocabulary.scores, strict=True)
    ]
    unknown = vocabulary.named.get("unk_token")
    byte_fallback = bool(vocabulary.of_kind(Kind.BYTE))

    def rename(names: Mapping[str, str]) -> models.Model:
        tokens = [names.get(token, token) for token in vocabulary.tokens]
        return models.Unigram(list(zip(tokens, scores, strict=True)), unknown, byte_fallback)

    backend = Backend(rename({}))
    add_tokens(backend, vocabulary)
    return Built(backend, rename)


def merges_of_file(metadata: Mapping[str, object]) -> list[Merge]:
    """The merges that the file lists. Raises TokenizerError."""
    lines = strings(metadata, "merges")
    if lines is None:
        raise TokenizerError(f"{PREFIX}merges is missing; {ADVICE}")
    parts = [line.partition(" ") for line in lines]
    for i, (_, space, _) in enumerate(parts):
        if not space:
            raise TokenizerError(
                f"{PREFIX}merges[{i}] is {shown(lines[i])}; it must be two tokens with a space "
                "between"
            )
    return [(left, right) for left, _, right in parts]


def merges_of_scores(vocabulary: Vocabulary) -> list[Merge]:
    """The merges that SentencePiece's scores stand for: what makes the best token comes first.

    Of those that make tokens of one score, the ones with the longer left part come first, as in
    transformers' conversions. Raises TokenizerError.
    """
    scores = vocabulary.scores
    if scores is None:
        raise TokenizerError(f"{PREFIX}scores and {PREFIX}merges are both missing; {ADVICE}")
    ids = vocabulary.of_kind(Kind.NORMAL)
    words = {vocabulary.tokens[i] for i in ids}
    merges: list[Merge] = []
    for _, same in groupby(sorted(ids, key=lambda i: -scores[i]), lambda i: scores[i]):
        found = [
            (token[:cut], token[cut:])
            for token in (vocabulary.tokens[i] for i in same)
            for cut in range(len(token) - 1, 0, -1)
            if token[:cut] in words and token[cut:] in words
        ]
        found.sort(key=lambda merge: (-len(merge[0]), -len(merge[1])))
        merges += found
    return merges
