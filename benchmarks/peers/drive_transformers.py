"""transformers' generate, in static batches padded on the left: the baseline (its continuous
batching is slower)."""

from __future__ import annotations

from common import Engine, Options, Stamps, Timing, clock, serve
from workloads import Request, Workload

PAD = 3


def load(options: Options) -> Engine:
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.directory,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    ).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(batch: list[Request], streamer: object = None) -> None:
        """One batch; every row is computed to the longest output of the batch."""
        length = max(len(r.prompt) for r in batch)
        output = max(r.output for r in batch)
        pads = [length - len(r.prompt) for r in batch]
        ids = torch.tensor([[PAD] * pad + r.prompt for pad, r in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads])
        made = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=output,
            min_new_tokens=output,
            eos_token_id=None,
            pad_token_id=PAD,
            streamer=streamer,
        )
        if made.shape[1] != length + output:
            raise RuntimeError(f"wanted {output} tokens a row, got {made.shape[1] - length}")

    class Streamer(transformers.generation.streamers.BaseStreamer):
        """Stamps the tokens of the one request; the first call brings its prompt."""

        def __init__(self, stamps: Stamps) -> None:
            self._stamps = stamps
            self._prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self._prompt:
                self._stamps.saw(0, value.numel())
            self._prompt = False

        def end(self) -> None:
            pass

    def run(work: Workload) -> Timing:
        if len(work.requests) == 1:
            stamps = Stamps(work)
            generate(work.requests, Streamer(stamps))
            return stamps.finish()
        start = clock()
        for first in range(0, len(work.requests), work.concurrency):
            generate(work.requests[first : first + work.concurrency])
        return Timing(clock() - start, [], [])

    versions = {"version": transformers.__version__, "torch": torch.__version__}
    return Engine(
        run,
        {
            **versions,
            "experts": "grouped_mm",
            "attention": "sdpa",
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    serve(load)
