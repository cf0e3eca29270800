"""LLM with a KV cache on disk: what one process leaves the next one starts from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_t5
from moebius import LLM, SamplingParams
from moebius.errors import ConfigError
from oracle import save_tiny
from tiny import write_model, write_tokenizer

ASKED = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": 2}
PARAMS = SamplingParams(**ASKED)
PROMPT = [(7 * i) % 300 + 3 for i in range(400)]
SIZES = {"kv_cache_memory_bytes": 2**23, "max_num_seqs": 4}


def disk(directory: Path) -> dict[str, object]:
    return {"kv_cache_disk": str(directory), "kv_cache_disk_bytes": 10**8}


def answer(model: Path, **options: object) -> tuple[object, int, int]:
    """The answer, how many tokens of the prompt were found, and how many files were read."""
    with LLM(str(model), **{**SIZES, **options}) as llm:
        output = llm.generate([PROMPT], PARAMS)[0]
        return output.outputs, output.num_cached_tokens, llm.client.stats().disk.reads


def test_an_llm_finds_what_the_last_one_left(tiny_model: Path, tmp_path: Path) -> None:
    expected = answer(tiny_model)[0]
    assert answer(tiny_model, **disk(tmp_path / "kv")) == (expected, 0, 0)
    # 399 tokens are read at most, of which 24 blocks of 16 are whole.
    found = answer(tiny_model, max_model_len=700, threads=1, **disk(tmp_path / "kv"))
    assert found == (expected, 384, 24)


@pytest.mark.exhaustive
def test_another_process_finds_it_too(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing in a name depends on the process, as the order of a set would."""
    options = disk(tmp_path / "kv")
    assert answer(tiny_model, **options)[1:] == (0, 0)
    code = (
        "from moebius import LLM, SamplingParams\n"
        f"with LLM({str(tiny_model)!r}, **{SIZES | options}) as llm:\n"
        f"    [output] = llm.generate([{PROMPT}], SamplingParams(**{ASKED}))\n"
        "    print(output.num_cached_tokens, llm.client.stats().disk.reads)"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout.split() == ["384", "24"]


def test_other_weights_find_nothing(tiny_model: Path, tmp_path: Path) -> None:
    answer(tiny_model, **disk(tmp_path / "kv"))
    other = tmp_path / "other"
    write_model(other, seed=1)
    expected = answer(other)[0]
    assert answer(other, **disk(tmp_path / "kv")) == (expected, 0, 0)


def test_without_the_secret_nothing_is_found(tiny_model: Path, tmp_path: Path) -> None:
    expected = answer(tiny_model, **disk(tmp_path / "kv"))[0]
    (tmp_path / "kv" / "secret").unlink()
    assert answer(tiny_model, **disk(tmp_path / "kv")) == (expected, 0, 0)


def test_a_hybrid_goes_on_from_a_snapshot_on_disk(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny(model, "qwen3_next", max_position_embeddings=1024, vocab_size=320)
    write_tokenizer(model)
    expected = answer(model)[0]
    assert answer(model, **disk(tmp_path / "kv"))[0] == expected
    found = answer(model, **disk(tmp_path / "kv"))
    assert found[0] == expected and found[1] >= 256 and found[2] > 16


def test_a_directory_in_use_or_of_others_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ConfigError, match="others may read"):
        answer(tiny_model, **disk(tmp_path / "open"))
    with LLM(str(tiny_model), **SIZES, **disk(tmp_path / "kv")):  # noqa: SIM117
        with pytest.raises(ConfigError, match="in use by another"):
            answer(tiny_model, **disk(tmp_path / "kv"))


def test_an_encoder_has_no_prefixes_to_keep(tmp_path: Path) -> None:
    tiny_t5.save(tmp_path / "model", "t5")
    tiny_t5.write_tokenizer(tmp_path / "model")
    with pytest.raises(ConfigError, match="with an encoder there are none to share"):
        LLM(str(tmp_path / "model"), **SIZES, **disk(tmp_path / "kv"))


def test_ranks_share_what_was_left(tiny_model: Path, tmp_path: Path) -> None:
    """Processes of their own, with another order of sets. Whichever a prompt comes to finds what a single engine left; and a single engine finds
    what a rank left."""
    expected = answer(tiny_model, **disk(tmp_path / "kv"))[0]
    other = [*PROMPT[:390], 9]
    another = [token + 1 for token in PROMPT]
    with LLM(str(tiny_model), ranks=2, **SIZES, **disk(tmp_path / "kv")) as llm:
        # Two at once, and so one for each rank.
        both = llm.generate([PROMPT, other], PARAMS)
        new = llm.generate([another], PARAMS)[0]
    assert both[0].outputs == expected
    assert [each.num_cached_tokens for each in both] == [384, 384]
    assert new.num_cached_tokens == 0
    assert {path.name for path in (tmp_path / "kv").iterdir()} == {"secret", "rank-0", "rank-1"}
    with LLM(str(tiny_model), **SIZES, **disk(tmp_path / "kv")) as one:
        again = one.generate([another], PARAMS)[0]
    assert again.outputs == new.outputs and again.num_cached_tokens == 384


@pytest.mark.exhaustive
def test_ranks_share_what_ranks_left(tiny_model: Path, tmp_path: Path) -> None:
    """Whichever rank the prompt comes to; and a single engine finds it again, too."""
    expected = answer(tiny_model)[0]
    with LLM(str(tiny_model), ranks=2, **SIZES, **disk(tmp_path / "kv")) as llm:
        first = llm.generate([PROMPT], PARAMS)[0]
    assert first.outputs == expected and first.num_cached_tokens == 0
    assert {path.name for path in (tmp_path / "kv").iterdir()} == {"secret", "rank-0", "rank-1"}
    with LLM(str(tiny_model), ranks=2, **SIZES, **disk(tmp_path / "kv")) as llm:
        # Two at once, and so one for each rank.
        both = llm.generate([PROMPT, [*PROMPT[:390], 9]], PARAMS)
    assert both[0].outputs == expected
    assert [each.num_cached_tokens for each in both] == [384, 384]
    assert answer(tiny_model, **disk(tmp_path / "kv")) == (expected, 384, 24)
