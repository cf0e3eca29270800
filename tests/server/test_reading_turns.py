"""Requests are read in turns between keys."""

from __future__ import annotations

import asyncio
from pathlib import Path

from moebius.server.reading_turns import ReadingTurns
from server.serving import Server, engine, run

KEYS = '[crowd]\nkey = "of-crowd"\n[one]\nkey = "of-one"\n[two]\nkey = "of-two"\n'


def order_of(accounts: list[str], *, leaving: int | None = None) -> list[str]:
    """In which order requests of these accounts, all there at once, get their turns; `leaving` is
    the number of one whose client does not wait."""
    got: list[str] = []

    async def ask(turns: ReadingTurns, account: str) -> None:
        await turns.take(account)
        got.append(account)

    async def main() -> None:
        turns = ReadingTurns()
        tasks = [asyncio.create_task(ask(turns, account)) for account in accounts]
        await asyncio.sleep(0)
        if leaving is not None:
            tasks[leaving].cancel()
        await asyncio.wait(tasks)
        # Nobody waits now: the next one does not wait either.
        await asyncio.wait_for(ask(turns, "later"), 1)

    asyncio.run(main())
    assert got.pop() == "later"
    return got


def test_one_of_another_key_waits_for_one_of_a_crowd() -> None:
    assert order_of(["crowd"] * 6 + ["one"]) == ["crowd"] * 2 + ["one"] + ["crowd"] * 4


def test_accounts_take_turns_and_each_keeps_its_order() -> None:
    assert order_of(["a", "a", "a", "b", "b", "c"]) == ["a", "a", "b", "c", "a", "b"]


def test_who_leaves_takes_no_turn() -> None:
    assert order_of(["a", "a", "b", "b"], leaving=1) == ["a", "b", "b"]


def test_outputs_are_heard_between_two_turns() -> None:
    """One request is read in a round of the event loop, however many wait."""
    rounds: list[int] = []

    async def main() -> None:
        turns = ReadingTurns()
        now = 0

        async def ask() -> None:
            await turns.take("a")
            rounds.append(now)

        tasks = [asyncio.create_task(ask()) for _ in range(8)]
        while not all(task.done() for task in tasks):
            now += 1
            await asyncio.sleep(0)

    asyncio.run(main())
    assert len(set(rounds)) == 8


def test_the_engine_gets_another_keys_request_amid_a_crowd(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    fake = engine()

    async def ask(server: Server, key: str) -> None:
        body = {"prompt": "hello", "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        response = await server.post("/v1/completions", body, headers=headers)
        assert response.status_code == 200

    async def test(server: Server) -> None:
        asked = ["of-crowd"] * 40 + ["of-one"] + ["of-crowd"] * 40 + ["of-two"]
        await asyncio.gather(*(ask(server, key) for key in asked))

    run(test, fake, api_keys_file=keys)
    owners = [request.share.account for request in fake.requests]
    assert len(owners) == 82
    assert owners.index("one") < 8
    assert owners.index("two") < 8
