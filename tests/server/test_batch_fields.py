"""A batch's calls: answered by the server's own application, whatever fields they have."""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path

from moebius.server.batch import BatchCall, run_batch
from server.serving import Server, engine, run


def test_calls_are_answered_as_the_server_answers_them(tmp_path: Path) -> None:
    """Fields that only some routes know, and fields that cannot be met."""
    chat = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "so "}],
        "continue_final_message": True,
        "echo": True,
    }
    bodies = {
        "prefill": ("/v1/chat/completions", chat),
        "cut": ("/v1/completions", {"prompt": "a b c d", "truncate_prompt_tokens": 2}),
        "response": ("/v1/responses", {"input": "x"}),
        "gap": ("/v1/completions", {"prompt": "a", "suffix": "b"}),
    }
    calls = [BatchCall(custom_id=n, url=url, body=body) for n, (url, body) in bodies.items()]
    path = tmp_path / "out.jsonl"

    async def check(server: Server) -> int:
        with FileIO(path, "ab") as out:
            return await run_batch(server.app, calls, out, concurrency=2, on_result=lambda: None)

    assert run(check, engine("good")) == 1
    found = {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    prefill = found["prefill"]["response"]["body"]["choices"][0]
    assert prefill["message"]["content"] == "so good"
    assert found["cut"]["response"]["body"]["usage"]["prompt_tokens"] == 2
    [item] = found["response"]["response"]["body"]["output"]
    assert item["content"][0]["text"] == "good"
    assert found["gap"]["response"]["status_code"] == 400
    assert found["gap"]["error"]["param"] == "suffix"
