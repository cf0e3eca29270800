"""Talking to a model of gpt-oss' format: what a person reads is its final message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moebius import LLM
from moebius.cli.main import main
from text.harmony import harmony_tokenizer
from tiny_gpt_oss import write_scripted

OPTIONS = {"dtype": "float32", "kv_cache_memory_bytes": 10**6}
USER = [{"role": "user", "content": "hello"}]


def written(directory: Path, reply: str) -> list[int]:
    """A model that replies so to any chat; the reply's ids."""
    tokenizer = harmony_tokenizer()
    ids = tokenizer.encode(reply, False)
    write_scripted(directory, [tokenizer.encode_chat(USER)[-1], *ids])
    return ids


@pytest.mark.parametrize("ending", ["<|return|>", "<|call|>"])
def test_a_chat_has_the_content_and_ends(tmp_path: Path, ending: str) -> None:
    ids = written(tmp_path, f"<|channel|>final<|message|>Well, {ending}")
    with LLM(str(tmp_path), **OPTIONS) as llm:
        params = llm.default_params(temperature=0, max_tokens=40)
        ((output,),) = (each.outputs for each in llm.chat(USER, params))
        assert (output.text, output.token_ids) == ("Well, ", tuple(ids))
        assert "".join(llm.stream_chat(USER, params)) == "Well, "
        completed = llm.generate([llm.tokenizer.encode_chat(USER)], params)
        assert completed[0].outputs[0].text == "finalWell, ", "completions have no channels"


def test_reasoning_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, "<|channel|>analysis<|message|>world<|return|>")
    with LLM(str(tmp_path), **OPTIONS) as llm:
        params = llm.default_params(temperature=0, max_tokens=40)
        ((output,),) = (each.outputs for each in llm.chat(USER, params))
    assert (output.text, output.finish_reason) == ("", "stop")


def test_reasoning_ends_at_its_budget(tmp_path: Path) -> None:
    head = "<|channel|>analysis<|message|>"
    ids = written(tmp_path, f"{head}hello world def<|end|>")
    with LLM(str(tmp_path), **OPTIONS) as llm:
        params = llm.default_params(temperature=0, max_tokens=len(ids))
        ((free,),) = (each.outputs for each in llm.chat(USER, params))
        ((held,),) = (each.outputs for each in llm.chat(USER, params, thinking_token_budget=2))
        end = llm.tokenizer.encode("<|end|>", False)
    begun = len(llm.tokenizer.encode(head, False)) + 2
    assert free.token_ids == tuple(ids) and begun < len(ids) - 1
    assert held.token_ids[: begun + 1] == (*ids[:begun], *end)


def test_a_conversation_keeps_final_messages_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, "<|channel|>final<|message|>Well!<|return|>")
    asked: list[list[dict[str, str]]] = []
    stream = LLM.stream_events

    def heard(llm: LLM, messages: list[dict[str, str]], *rest: object) -> object:
        asked.append(messages)
        return stream(llm, messages, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "stream_events", heard)
    typed = iter(["hello", "again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys, "argv", ["moebius", "chat", str(tmp_path), "--temperature", "0",
                                      "--dtype", "float32", "--max-model-len", "512"])  # fmt: skip
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.splitlines() == ["Well!", "Well!"]
    answer = {"role": "assistant", "content": "Well!"}
    assert asked == [USER, [*USER, answer, {"role": "user", "content": "again"}]]
