"""Structured output from end to end: answers to random schemas are of these schemas, says jsonschema,
which knows nothing of what held them.

benchmarks/structured_output.py asks for a thousand.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema

from moebius import LLM, SamplingParams, StructuredOutput
from random_schemas import random_schema

SCHEMAS = 24


def test_every_whole_answer_is_of_its_schema(tiny_model: Path) -> None:
    """All at once, in a cache that cannot hold them all; a random model at random temperatures."""
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    params = [
        SamplingParams(
            temperature=rng.choice((0.0, 0.7, 1.5, 1.5)),
            max_tokens=400,
            seed=i,
            structured=StructuredOutput(json=schema, disable_any_whitespace=i % 2 > 0),
        )
        for i, schema in enumerate(schemas)
    ]
    prompts = [f"{rng.random()}" for _ in schemas]
    with LLM(str(tiny_model), kv_cache_memory_bytes=2**19, max_num_seqs=SCHEMAS) as llm:
        outputs = [each.outputs[0] for each in llm.generate(prompts, params)]
    whole = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason in ("stop", "length")
        if output.finish_reason == "stop":
            whole += 1
            jsonschema.validate(
                json.loads(output.text), schema, format_checker=jsonschema.FormatChecker()
            )
    assert whole > SCHEMAS / 2
