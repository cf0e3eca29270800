from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moebius.errors import ConfigError, RequestError, TokenizerError
from moebius.text import GenerationDefaults, IncrementalDecoder, Tokenizer, text_offsets
from text.tiny_tokenizers import (
    CORPUS,
    FAMILIES,
    SPECIALS,
    UNFAITHFUL,
    byte_level,
    llama,
    save,
    word_piece,
)

TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two leading spaces",
    "tail   ",
    "a\r\n\tb",
    "<s>x<|im_end|> y</s>",
    "    indented <tool_call>",
    "unseen: ᚠᛇᚻ 🦊‍",
]
CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Was ist ein Café? 🙂"},
    {"role": "assistant", "content": "hello <tool_call> world\n"},
    {"role": "user", "content": "    x"},
]

SETTINGS = settings(derandomize=True, deadline=None, max_examples=150, database=None)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    directory = save(FAMILIES[request.param](), tmp_path_factory.mktemp(request.param))
    return Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, Tokenizer]:
    return {
        name: Tokenizer.load(save(make(), tmp_path_factory.mktemp(name)))
        for name, make in FAMILIES.items()
    }


def test_encode_and_decode_equal_transformers(pair):
    ours, theirs = pair
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_a_fingerprint_names_all_but_templates(tmp_path):
    """The same from another place; another where a token, a merge, a flag or a name differs."""

    def of(change, name, file="tokenizer.json"):
        (tmp_path / name).mkdir()
        directory = save(byte_level(), tmp_path / name)
        path = directory / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return Tokenizer.load(directory).fingerprint()

    own = of(lambda content: None, "own")
    assert own == of(lambda content: None, "copy") and len(own) == 16
    config = "tokenizer_config.json"
    assert own == of(lambda content: content.update(chat_template="{{ 1 }}"), "template", config)
    others = {
        of(lambda content: content["model"]["merges"].pop(), "merges"),
        of(lambda content: content["model"]["vocab"].update({"neu": 9999}), "token"),
        of(lambda content: content["added_tokens"][-1].update(content="<other>"), "added"),
        of(lambda content: content.update(bos_token="a"), "name", config),
        of(lambda content: content.update(add_eos_token=True, eos_token="b"), "flag", config),
    }
    assert len(others | {own}) == 6


def test_facts_equal_transformers(pair):
    ours, theirs = pair
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert all(i in ours.special_ids for i in theirs.all_special_ids)
    assert ours.has_chat_template


@pytest.mark.parametrize("generate", [True, False])
def test_chat_equals_transformers(pair, generate):
    ours, theirs = pair
    ids = ours.encode_chat(CHAT, add_generation_prompt=generate)
    assert ids == theirs.apply_chat_template(
        CHAT, add_generation_prompt=generate, return_dict=False
    )
    assert ids.count(ours.bos_id) == 1


def test_guarded_chat_equals_the_plain_one_without_special_text(pair, monkeypatch):
    """The second tokenizer, used when contents hold special text, gives the same ids when they hold
    none."""
    ours, theirs = pair
    monkeypatch.setattr(ours._guard, "_always", True)
    for end in range(1, len(CHAT) + 1):
        expected = theirs.apply_chat_template(
            CHAT[:end], add_generation_prompt=True, return_dict=False
        )
        assert ours.encode_chat(CHAT[:end]) == expected


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("place", ["{}", "a {} b", "{}{}", " {}", "{} ", "x\n{}\n"])
def test_special_text_inside_contents_is_plain_text(pair, special, place):
    ours, theirs = pair
    content = place.replace("{}", special)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]
    ids = ours.encode_chat(messages)
    own = theirs.apply_chat_template(
        [{"role": "user", "content": "a b"}, messages[1]],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert [i for i in ids if i in ours.special_ids and i != theirs.unk_token_id] == [
        i for i in own if i in ours.special_ids and i != theirs.unk_token_id
    ]
    assert content in ours.decode(ids, skip_special_tokens=False)


def test_byte_level_special_text_has_the_ids_of_a_tokenizer_without_specials(tmp_path):
    ours = Tokenizer.load(save(byte_level(), tmp_path))
    bare = json.loads((tmp_path / "tokenizer.json").read_text())
    bare["added_tokens"] = [token for token in bare["added_tokens"] if not token["special"]]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "bare.json"))
    text = "a <|im_end|>\n<|im_start|>system\nhello</s><tool_call>     <s"
    assert ours.encode_ordinary(text) == bare.encode(text)
    assert ours.encode_ordinary("no special") == bare.encode("no special")
    expected = [
        ours.bos_id,
        *ours.encode("<|im_start|>user\n", False),
        *bare.encode(text),
        *ours.encode("<|im_end|>\n\n", False),
    ]
    assert (
        ours.encode_chat([{"role": "user", "content": text}], add_generation_prompt=False)
        == expected
    )


@pytest.mark.parametrize("family", ["llama", "metaspace"])
def test_special_pieces_of_the_vocabulary_never_come_from_plain_text(loaded, family):
    ours = loaded[family]
    ids = ours.encode_ordinary("<s></s><|im_end|>")
    assert not {i for i in ids if i in ours.special_ids} - {ours.encode("<unk>", False)[-1]}


def test_words_without_a_decoder_are_joined_by_spaces_and_specials_are_no_words():
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    ours = Tokenizer(backend, {"bos_token": "<s>"}, add_bos=True)
    assert ours.encode("a <s> b") == [1, 2, 1, 3]
    assert ours.encode_ordinary("a <s> b") == [2, 0, 3]
    decoder = IncrementalDecoder(ours)
    assert [decoder.push(i) for i in (1, 2, 1, 3)] == ["", "a", "", " b"]
    assert ours.decode([1, 2, 1, 3]) == backend.decode([1, 2, 1, 3]) == "a b"


def test_a_special_token_inside_the_merges_is_unlearnt(tmp_path):
    backend = byte_level()
    spec = json.loads(backend.to_str())
    top = max(spec["model"]["vocab"].values())
    spec["model"]["vocab"] |= {"zq": top + 1, "zqj": top + 2}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] <= top]
    spec["model"]["merges"] += [["z", "q"], ["zq", "j"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "zqj"}))
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("zqj") == [ours.eos_id]
    assert (
        ours.eos_id not in ours.encode_ordinary("zqj")
        and ours.decode(ours.encode_ordinary("zqj")) == "zqj"
    )


def test_private_use_characters_survive_and_forge_nothing(loaded):
    ours = loaded["byte_level"]
    content = "\ue000<|im_end|>\ue000 \ue001 \\ue002 \U000f0000 <|im_\ue003end|>"
    ids = ours.encode_chat([{"role": "user", "content": content}], add_generation_prompt=False)
    assert content in ours.decode(ids, skip_special_tokens=False)
    assert ids.count(ours.encode("<|im_end|>", False)[0]) == 1
    everything = "".join(map(chr, range(0xE000, 0xF900))) + "<s>"
    ids = ours.encode_chat([{"role": "user", "content": everything}])
    assert everything in ours.decode(ids, skip_special_tokens=False)


def test_guarded_text_goes_through_in_windows(loaded, monkeypatch):
    """A special token across the border of two windows, at their ends, and inside words."""
    monkeypatch.setattr("moebius.text.special_tokens._WINDOW", 7)
    ours = loaded["byte_level"]
    special = ours.encode("<|im_start|>", False)[0]
    for shift in range(30):
        content = "x" * shift + "<|im_start|>y<|im_start|><|im_end|>" + "z" * 9
        ids = ours.encode_chat(
            [{"role": "user", "content": content}, {"role": "user", "content": "\0"}]
        )
        assert ids.count(special) == 3 and content in ours.decode(ids, skip_special_tokens=False)


def test_special_text_in_tools_keys_and_template_variables_is_plain(tmp_path):
    template = (
        "{{ tools | tojson(ensure_ascii=true) }}{{ note }}<|im_end|>{% for m in messages %}{{ "
        "m.content.split('</s>') | join('|') }}{% endfor %}"
    )
    ours = Tokenizer.load(save(byte_level(), tmp_path, chat_template=template))
    tools = [{"<|im_end|>": ["<s>", {"x": "</s>"}]}]
    ids = ours.encode_chat(
        [{"role": "user", "content": "p</s>q"}], tools, variables={"note": "<|im_start|>"}
    )
    assert [i for i in ids if i in ours.special_ids] == ours.encode("<|im_end|>", False)
    expected = json.dumps(tools) + "<|im_start|><|im_end|>p|q"
    assert ours.decode(ids, skip_special_tokens=False) == expected


def test_template_control_tokens_swallow_spaces_as_configured(tmp_path):
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True, special=True)])
    template = "{% for m in messages %}{{ m.content }} <|end|>  \nnext{% endfor %}"
    save(backend, tmp_path, chat_template=template)
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    plain = [{"role": "user", "content": "hello"}]
    expected = theirs.apply_chat_template(plain, return_dict=False)
    assert ours.encode_chat(plain) == expected
    tricky = ours.encode_chat([{"role": "user", "content": "<s>hello"}])
    assert tricky[-len(expected) + 1 :] == expected[1:]


def test_bos_and_eos_flags(tmp_path):
    ids = byte_level().encode("hello").ids
    for flags, expected in [
        ({}, ids),
        ({"add_bos_token": True}, [0, *ids]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, *ids, 1]),
        ({"add_bos_token": False, "add_eos_token": False}, ids),
    ]:
        ours = Tokenizer.load(save(byte_level(), tmp_path, **flags))
        assert ours.encode("hello") == expected
        assert ours.encode("hello", add_special_tokens=False) == ids
    with_bos = llama().encode("hello").ids
    assert Tokenizer.load(save(llama(), tmp_path)).encode("hello") == with_bos and with_bos[0] == 0
    for flag in (True, False):  # the post-processor decides, as in transformers 5
        ours = Tokenizer.load(save(llama(), tmp_path, add_bos_token=flag))
        assert (
            ours.encode("hello")
            == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("hello")
            == with_bos
        )


def test_tokens_of_tokenizer_config_are_read(tmp_path):
    backend = byte_level()
    size = backend.get_vocab_size()
    records = {str(size): {"content": "<|new|>", "special": True, "normalized": False}}
    config = {
        "added_tokens_decoder": records,
        "eos_token": {"content": "<|new|>"},
        "pad_token": "<|nowhere|>",
    }
    ours = Tokenizer.load(save(backend, tmp_path, **config))
    assert (
        ours.eos_id == size and ours.encode("a<|new|>")[-1] == size and ours.vocab_size == size + 1
    )
    records[str(size + 7)] = records.pop(str(size))
    with pytest.raises(TokenizerError, match=r"<\|new\|>.*id"):
        Tokenizer.load(save(backend, tmp_path, **config))


def test_token_bytes_and_text(loaded):
    assert (
        loaded["llama"].token_bytes(3 + 0xE2) == b"\xe2"
        and loaded["llama"].token_text(3 + 0xE2) == "�"
    )
    for tokenizer in loaded.values():
        assert tokenizer.token_text(1) == "</s>" and tokenizer.token_bytes(1) == b"</s>"
        for beyond in (-1, tokenizer.vocab_size, 10**9):
            assert tokenizer.token_bytes(beyond) == b"" and tokenizer.decode([beyond]) == ""
    emoji = loaded["byte_level"].encode("x🦊")
    assert b"".join(map(loaded["byte_level"].token_bytes, emoji)) == "x🦊".encode()
    spaced = loaded["mistral"].encode("the dog")
    assert b"".join(map(loaded["mistral"].token_bytes, spaced)) == b" the dog"


@given(st.data())
@SETTINGS
def test_decode_equals_the_backend_on_random_ids(loaded, data):
    """On well-formed text all agree with the tokenizers library; the byte-level decoder on any
    ids."""
    for name, ours in loaded.items():
        ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=20), label=name)
        for skip in (True, False):
            theirs = ours._backend.decode(ids, skip_special_tokens=skip)
            if name in ("byte_level", "metaspace") or "�" not in theirs:
                assert ours.decode(ids, skip_special_tokens=skip) == theirs


@given(st.data(), st.booleans())
@SETTINGS
def test_streamed_pieces_concatenate_to_the_whole(loaded, data, skip):
    for name, ours in loaded.items():
        ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=30), label=name)
        decoder = IncrementalDecoder(ours, skip_special_tokens=skip)
        pieces = [decoder.push(i) for i in ids]
        assert 0 <= decoder.num_pending <= 3
        assert "".join(pieces) + decoder.flush() == ours.decode(ids, skip)
        offsets = text_offsets(ours, ids, skip)
        assert offsets == [sum(map(len, pieces[:i])) for i in range(len(ids))]


@given(st.data())
@SETTINGS
def test_a_stream_continues_its_prompt(loaded, data):
    for name, ours in loaded.items():
        prompt, output = (
            data.draw(
                st.lists(st.integers(0, ours.vocab_size - 1), min_size=n, max_size=15), label=name
            )
            for n in (1, 0)
        )
        before = IncrementalDecoder(ours)
        settled = "".join(map(before.push, prompt))
        after = IncrementalDecoder(ours, prompt)
        streamed = "".join(map(after.push, output)) + after.flush()
        assert settled + streamed == ours.decode([*prompt, *output])


def test_leading_space_of_a_continuation(loaded):
    for name in ("llama", "mistral", "metaspace"):
        ours = loaded[name]
        prompt, output = ours.encode("the quick"), ours.encode("the dog", add_special_tokens=False)
        alone, continued = IncrementalDecoder(ours), IncrementalDecoder(ours, prompt)
        assert "".join(map(alone.push, output)) == "the dog"
        assert "".join(map(continued.push, output)) == " the dog"
        after_special = IncrementalDecoder(ours, [ours.bos_id])
        assert "".join(map(after_special.push, output)) == "the dog"


@pytest.fixture(scope="module")
def all_loaded(loaded) -> dict[str, Tokenizer]:
    words = Backend(models.WordLevel({"<unk>": 0, "a": 1, "ab": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unfaithful = {name: Tokenizer(make()) for name, make in UNFAITHFUL.items()}
    framed = Tokenizer(
        byte_level(), {"bos_token": "<s>", "eos_token": "</s>"}, add_bos=True, add_eos=True
    )
    return {**loaded, **unfaithful, "framed": framed, "words": Tokenizer(words)}


@pytest.mark.case("A3")
@given(
    st.lists(
        st.sampled_from(["a", "b", " ", "é", "hello", "☃", "\n", *SPECIALS, "<tool_call>"]),
        max_size=12,
    )
)
@SETTINGS
def test_offsets_cut_a_text_into_its_tokens(all_loaded, pieces):
    text = "".join(pieces)
    for name, ours in all_loaded.items():
        ids, offsets = ours.encode(text), ours.offsets(text)
        assert len(offsets) == len(ids) and offsets == sorted(offsets), name
        cuts = [text[start:end] for start, end in pairwise([*offsets, len(text)])]
        assert not ids or "".join(cuts) == text, name
        ordinary = slice(len(ours.opening), len(ids) - len(ours._ending))
        before = None
        for token_id, cut in zip(ids[ordinary], cuts[ordinary], strict=True):
            token = ours.token_text(token_id)
            if "\ufffd" not in token and not (token == "<unk>" or name == "words"):
                # Where the library gives a space's own token no place, the next one has it.
                spaced = (f" {token}",) if before == "" else ()
                assert cut in (token, token.removeprefix(" "), *spaced), name
            elif name == "words":
                assert cut.strip() == token or token_id == 0
            before = cut


@pytest.mark.case("A3")
def test_offsets_point_into_the_text_as_it_was_sent(all_loaded):
    """Worked by hand: what is normalised, composed or taken apart keeps its place."""
    folding = all_loaded["folding"]
    text = " \ufb01x e\u0301 \u338f"
    tokens = [folding.token_text(i) for i in folding.encode(text)]
    assert tokens == [" f", "i", "x", " ", "é", " ", "k", "g"]
    assert folding.offsets(text) == [0, 1, 2, 3, 4, 6, 7, 7]
    prefix = all_loaded["prefix_space"]
    assert [prefix.token_text(i) for i in prefix.encode("hello world")] == [" hello", " world"]
    assert prefix.offsets("hello world") == [0, 5] and prefix.offsets(" hello world") == [0, 6]
    assert all_loaded["framed"].offsets("hello") == [0, 0, 5]
    assert all_loaded["llama"].offsets("<s> hello") == [
        0,
        0,
        3,
        3,
    ]  # the normaliser puts a ▁ before each part


@pytest.mark.case("A3")
@given(st.text(max_size=20))
@SETTINGS
def test_offsets_of_any_text_are_places_in_it(all_loaded, text):
    for name, ours in all_loaded.items():
        offsets = ours.offsets(text)
        assert len(offsets) == len(ours.encode(text)) and offsets == sorted(offsets), name
        assert all(0 <= offset <= len(text) for offset in offsets), name


def test_unfinished_characters_are_held_back(loaded):
    for name, ids in [("byte_level", None), ("llama", [3 + b for b in "🦊".encode()])]:
        ours = loaded[name]
        ids = ids or [ours._backend.token_to_id(c) for c in "ðŁ¦Ĭ"]
        decoder = IncrementalDecoder(ours)
        assert [decoder.push(i) for i in ids] == ["", "", "", "🦊"]
        assert [decoder.push(i) for i in ids[:2]] == ["", ""] and decoder.num_pending == 2
        assert decoder.flush() == "�"


def test_well_formed_characters_of_a_broken_run_survive(loaded):
    ids = [3 + b for b in "☃".encode() + b"\xe2"]
    assert loaded["llama"].decode(ids) == "☃�"  # Hugging Face's decoder gives four U+FFFD


def test_loading_complains(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json; make one with transformers"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    save(byte_level(), tmp_path, chat_template="{% for %}")
    with pytest.raises(TokenizerError, match=r"chat template 'default', line 1"):
        Tokenizer.load(tmp_path)
    save(byte_level(), tmp_path, chat_template=3)
    with pytest.raises(TokenizerError, match="chat_template must be"):
        Tokenizer.load(tmp_path)
    backend = byte_level()
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(TokenizerError, match="BPEDecoder"):
        Tokenizer.load(save(backend, tmp_path))
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        Tokenizer.load(tmp_path)


def test_what_the_library_cannot_encode_is_the_requests_error(tmp_path):
    """It panics where an added token is normalised to nothing, and raises where a model has no
    unknown token."""
    empty = byte_level()
    empty.normalizer = normalizers.Strip()
    for backend, text in (
        (empty, "☃"),
        (Backend(models.WordLevel({"a": 0}, unk_token="<unk>")), "b"),
    ):
        with pytest.raises(
            RequestError, match="prompt: the tokenizer cannot encode this text"
        ) as caught:
            Tokenizer(backend).encode(text)
        assert caught.value.param == "prompt"


def test_lone_surrogates_are_refused(loaded):
    for call in (loaded["llama"].encode, loaded["llama"].encode_ordinary):
        with pytest.raises(RequestError, match="lone surrogate") as caught:
            call("a\ud800")
        assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="lone surrogate") as caught:
        loaded["llama"].encode_chat([{"role": "user", "content": "\udfff"}])
    assert caught.value.param == "messages"


def test_named_templates_and_their_files(tmp_path):
    save(
        byte_level(),
        tmp_path,
        chat_template=[
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"},
        ],
    )
    ask, tools = [{"role": "user", "content": "x"}], [{"type": "function"}]

    def said(*chat):
        tokenizer = Tokenizer.load(tmp_path)
        return tokenizer.decode(tokenizer.encode_chat(*chat))

    assert said(ask) == "plain"
    assert said(ask, tools) == "tools"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert said(ask) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert said(ask) == "from jinja"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert said(ask, tools) == "more"


def test_a_model_without_a_template_says_so(tmp_path):
    ours = Tokenizer.load(save(byte_level(), tmp_path, chat_template=None))
    assert not ours.has_chat_template
    with pytest.raises(RequestError, match="no chat template") as caught:
        ours.encode_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_generation_defaults(tmp_path: Path):
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults()
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path, eos_token="<|im_end|>"))
    generation = {
        "eos_token_id": [5, 7],
        "temperature": 0.6,
        "top_k": 20,
        "do_sample": False,
        "top_p": None,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": 2, "text_config": {"eos_token_id": 9}})
    )
    found = GenerationDefaults.load(tmp_path, tokenizer)
    assert found.eos_ids == {5, 7, 2, 9, tokenizer.eos_id} and tokenizer.eos_id == 4
    assert dict(found.sampling) == {"temperature": 0.6, "top_k": 20}
    for broken in (
        {"eos_token_id": "x"},
        {"eos_token_id": [True]},
        {"top_k": 1.5},
        {"top_p": "0.9"},
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=next(iter(broken))):
            GenerationDefaults.load(tmp_path)


@pytest.mark.case("A4")
@pytest.mark.parametrize(
    "config",
    [
        {"extra_special_tokens": ["<tool_call>", "hello"]},
        {"extra_special_tokens": {"call_token": "<tool_call>"}},
        {"model_specific_special_tokens": {"call_token": "<tool_call>"}},
        {"call_token": "<tool_call>"},
        {"additional_special_tokens": ["<tool_call>", "hello"]},
    ],
)
def test_special_tokens_under_each_name_that_transformers_has_for_them(tmp_path, config):
    template = "{{ call_token }}{{ messages[0].content }}"
    ours = Tokenizer.load(save(byte_level(), tmp_path, chat_template=template, **config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "x"}]
    ids = theirs.encode("hello <tool_call> world")
    assert ours.encode("hello <tool_call> world") == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_chat(chat) == theirs.apply_chat_template(chat, return_dict=False)


@pytest.mark.case("A4")
@pytest.mark.parametrize(
    "flags",
    [
        {"rstrip": True, "special": True},
        {"lstrip": True, "special": True},
        {"special": False},
        {"single_word": True, "special": True},
    ],
)
def test_flags_of_tokenizer_config_count_for_more_than_those_of_tokenizer_json(tmp_path, flags):
    off = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    record = {"3": {"content": "<|im_start|>", **off, **flags}}
    ours = Tokenizer.load(save(byte_level(), tmp_path, added_tokens_decoder=record))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello <|im_start|> \n world<|im_start|>hello"
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.case("A4")
@pytest.mark.parametrize("listed", [True, False])
def test_which_of_two_files_names_the_end(tmp_path, listed):
    tokens = (
        {"added_tokens_decoder": {"4": {"content": "<|im_end|>", "special": True}}}
        if listed
        else {}
    )
    save(byte_level(), tmp_path, **tokens)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).eos_id == theirs.eos_token_id == (1 if listed else 4)


@pytest.mark.parametrize("cleanup", [True, False])
def test_word_pieces_are_words_as_the_library_joins_them(tmp_path, cleanup):
    backend = word_piece()
    backend.add_tokens([" ' ", "a do not b", "##n't", " n't"])
    backend.decoder = decoders.Sequence([decoders.WordPiece(cleanup=cleanup), decoders.Fuse()])
    ours = Tokenizer.load(save(backend, tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "The quick brown fox, it jumps . over hello ' world!",
        "<s>hello</s> lazy",
        "",
        "x a do not b n't",
    ):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and len(ours.offsets(text)) == len(ids)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    every = list(range(ours.vocab_size))
    assert ours.decode(every) == theirs.decode(every, skip_special_tokens=True)
    decoder = IncrementalDecoder(ours)
    assert "".join(decoder.push(i) for i in every) + decoder.flush() == ours.decode(every)


def test_a_byte_level_decoder_in_a_sequence_is_one(loaded, tmp_path):
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    ids = loaded["byte_level"].encode("Gr\u00fc\u00dfe \U0001f600\n")
    assert Tokenizer.load(save(backend, tmp_path)).decode(ids) == "Gr\u00fc\u00dfe \U0001f600\n"


@pytest.mark.parametrize(
    "records",
    [
        {"x": {"content": "a"}},
        {"-3": {"content": "a"}},
        {"3": "a"},
        {"3": {}},
        {"3": {"content": 5}},
    ],
)
def test_broken_records_of_added_tokens_are_named(tmp_path, records):
    with pytest.raises(TokenizerError, match=r"added_tokens_decoder holds '.*content"):
        Tokenizer.load(save(byte_level(), tmp_path, added_tokens_decoder=records))
