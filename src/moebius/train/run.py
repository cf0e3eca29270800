"""From a recipe to a model directory: prepare the data, train, measure, export, write the card."""

import hashlib
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import moebius
from moebius.errors import ConfigError, StorageError
from moebius.files import anyone, json_text, write_file
from moebius.inspect.config import InspectConfig
from moebius.inspect.corpus import Document
from moebius.inspect.run import write_report
from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.ops.cuda import no_cuda
from moebius.train.corpus import Corpus, reads_below
from moebius.train.data import PreparedData, holds_run, prepare, prepared
from moebius.train.evaluate import routers
from moebius.train.export import (
    export,
    figures_table,
    measure,
    model_card,
    read_twin,
    would_replace,
)
from moebius.train.loop import Line, run
from moebius.train.memory import told_of_memory
from moebius.train.ops import TrainingOps
from moebius.train.ranks import TIMEOUT, Ranks
from moebius.train.recipe import Recipe, read_recipe
from moebius.train.sharing import Sharing
from moebius.train.step import StepReport
from moebius.train.tables import TokenizerRecipe
from moebius.train.trainer import Trainer


def main_from_recipe(
    recipe_path: Path,
    out: Path,
    *,
    resume: bool = False,
    evaluate_only: bool = False,
    dense_twin: bool = False,
    against: Path | None = None,
    device: str = "auto",
    rank_timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Train `recipe_path`'s model into `out`, or measure the one there; figures by kind of text.

    The options are the command line's (moebius.cli.train). out/training keeps what is needed to
    continue and, in `inspection`, what moebius inspect reports of the held-out documents. As one of
    several ranks than the first it returns nothing. Raises: UsageError, NumericalError,
    StorageError or, where another rank is lost, PeerError, each of which leaves the last checkpoint
    whole.
    """
    where = _device(device)
    ranks = Ranks.join(where, rank_timeout)
    advice = "lower training.row_length, or measure with --evaluate-only --device cpu"
    try:
        recipe = ranks.together(lambda: _recipe(recipe_path, dense_twin=dense_twin))
        ranks.require_same(_facts(recipe, resume=resume, evaluate_only=evaluate_only))
        with told_of_memory(where, "measuring", 0, advice):
            if evaluate_only:
                if resume or against is not None:
                    raise ConfigError(
                        "--evaluate-only trains nothing and writes no card: it takes no --resume "
                        "and no --against"
                    )
                figures = _evaluate(recipe, out, where, ranks)
            else:
                ranks.together(lambda: _check_out(recipe, out, resume=resume))
                figures = _train(recipe, _shown(recipe_path), out, against, where, ranks)
    except OSError as error:
        raise StorageError(
            f"{error.filename or out} cannot be written or read: {error.strerror or error}"
        ) from None
    finally:
        ranks.leave()
    if ranks.rank:
        return {}
    print(figures_table(figures))
    return figures


def _shown(path: Path) -> str:
    """What the card calls a recipe."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path.name


def _recipe(path: Path, *, dense_twin: bool) -> Recipe:
    recipe = read_recipe(path)
    return recipe.dense_twin() if dense_twin else recipe


def _facts(recipe: Recipe, **options: bool) -> dict[str, str | int]:
    """What all ranks must have alike before anything else."""
    corpus = replace(recipe.corpus, files=dict.fromkeys(recipe.corpus.files, ()))
    told = repr(replace(recipe, corpus=corpus, tokenizer=TokenizerRecipe()))
    return {
        "moebius": moebius.__version__,
        "torch": torch.__version__,
        "recipe": hashlib.sha256(told.encode()).hexdigest()[:12],
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
    }


def _device(wish: str) -> torch.device:
    if wish not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is {wish!r}; use auto, cpu or cuda")
    if wish != "cpu" and torch.cuda.is_available():
        # Before cuBLAS is used: then its sums have one order, run after run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return torch.device("cuda", _local_rank(torch.cuda.device_count()))
    if wish == "cuda":
        raise no_cuda()
    return torch.device("cpu")


def _local_rank(devices: int) -> int:
    """This rank's number on its host, which is its device's."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= devices:
        raise ConfigError(
            f"rank {os.environ.get('RANK', '0')} is number {number} on {socket.gethostname()}, "
            f"which has {devices} CUDA device{'s' * (devices != 1)}; start no more ranks there, or "
            "use --device cpu"
        )
    return number


def _check_out(recipe: Recipe, out: Path, *, resume: bool) -> None:
    """ConfigError where training into `out` would replace what this run has not written."""
    other = "choose another --out"
    started = (out / "training" / "checkpoint.safetensors").exists()
    if started and not resume:
        raise ConfigError(
            f"{out} holds a training run already; continue it with --resume, or {other}"
        )
    base = recipe.base()
    if base is not None and out.exists() and out.samefile(base):
        raise ConfigError(f"{out} is the checkpoint that is to be fine-tuned; {other}")
    if not started and not holds_run(out / "training" / "data"):
        there = would_replace(recipe, out)
        if _has_entries(out / "training"):
            there.append("training")
        if there:
            raise ConfigError(
                f"{out} holds {', '.join(there)} already, which training would replace; {other}"
            )
    for kind, roots in recipe.corpus.files.items():
        for root in map(Path, roots):
            if reads_below(root, out):
                raise ConfigError(
                    f"{out} lies in {root}, which is read as corpus.files.{kind}: what is written "
                    f"there would be trained on; {other}"
                )


def _has_entries(path: Path) -> bool:
    """Whether something is there, but for an empty directory."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _train(
    recipe: Recipe,
    shown: str,
    out: Path,
    against: Path | None,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, Any]:
    folder = out / "training"
    ranks.lead(lambda: prepare(recipe, folder / "data"))
    data = ranks.together(lambda: _prepared(recipe, folder / "data"))
    ranks.require_same(_text(data))
    twin = None if against is None else ranks.lead(lambda: read_twin(against, data))
    if ranks.rank == 0:
        _note(data.untrained(recipe))
    trainer = ranks.together(lambda: Trainer(recipe, data, device=device, ranks=ranks))
    _run_with_progress(trainer, folder)
    export(trainer, out)
    figures = measure(trainer.decoder, recipe, data, trainer.sharing)
    ranks.lead(lambda: _describe(trainer, figures, shown, out, twin))
    return figures


def _prepared(recipe: Recipe, folder: Path) -> PreparedData:
    """What rank 0 has prepared, who alone needs the texts."""
    try:
        return prepared(recipe, folder)
    except ConfigError as error:
        raise ConfigError(
            f"{error}, though rank 0 has just written it; --out must be a directory that all hosts "
            "share"
        ) from None


def _text(data: PreparedData) -> dict[str, str | int]:
    """Of which ranks must all have the same."""
    return {"text": data.facts["corpus_sha256"][:12], "vocabulary": data.vocab_size}


def _note(lines: Iterable[str]) -> None:
    console = Console(stderr=True)
    for line in lines:
        console.print(f"note: {line}", soft_wrap=True, markup=False, highlight=False)


def _describe(
    trainer: Trainer,
    figures: Mapping[str, Any],
    shown: str,
    out: Path,
    twin: Mapping[str, Any] | None,
) -> None:
    """Write figures.json, the card and what the routers do of what was trained."""
    recipe = trainer.recipe
    folder = out / "training"
    tokens = trainer.done * recipe.training.tokens_per_step
    summary = {
        "figures": figures,
        "tokens_per_second": round(tokens / max(trainer.seconds, 1e-9)),
        "seconds": trainer.seconds,
    }
    write_file(folder / "figures.json", json_text(summary, indent=2) + "\n", ours=anyone)
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    whole = Decoder(trainer.decoder.config, TrainingOps(), device="meta")
    card = model_card(template, whole, recipe, trainer.data.facts, summary, twin, recipe_path=shown)
    write_file(out / "README.md", card, ours=anyone)
    if routers(trainer.decoder):
        config = InspectConfig(row_length=recipe.training.row_length)
        documents = _heldout(recipe)
        write_report(out, documents, folder / "inspection", config, name=recipe.name)


def _heldout(recipe: Recipe) -> Iterator[Document]:
    """The held-out documents, for an inspection."""
    for document in Corpus(recipe.corpus):
        if document.split == "heldout":
            yield Document(document.path, document.kind, document.text)


def _run_with_progress(trainer: Trainer, folder: Path) -> None:
    """Train while showing loss, speed, remaining time and router health on stderr."""
    console = Console(stderr=True)
    steps = trainer.recipe.training.steps
    first = trainer.ranks.rank == 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("remaining"),
        console=console,
        disable=not (console.is_terminal and first),
    ) as progress:
        bar = progress.add_task(trainer.recipe.name, total=steps)

        def show(done: int, report: StepReport) -> None:
            progress.update(bar, completed=done, description=f"loss {report.loss:.3f}")

        def tell(line: Line) -> None:
            console.print(
                f"step {line['step']} of {steps}: loss {line['loss']:.4f}, {_health(line)}",
                soft_wrap=True,
            )

        run(trainer, folder, show, tell, lambda path: export(trainer, path))


def _health(line: Line) -> str:
    """Speed and, over the layers with a router, the worst of each measure."""
    told = f"{line['tokens_per_second']:,} tokens/s"
    if "max_violation" in line:
        told += (
            f", MaxVio {max(line['max_violation']):.2f}, load entropy "
            f"{min(line['load_entropy']):.3f}"
        )
        told += f", dead experts {sum(line['dead_experts'])}, dropped {max(line['dropped']):.1%}"
    if "heldout_bits_per_byte" in line:
        told += f", held-out {line['heldout_bits_per_byte']['all']:.4f} bits a byte"
    return told


def _evaluate(recipe: Recipe, out: Path, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    def load() -> tuple[Decoder, Sharing]:
        if not (out / "model.safetensors").exists():
            raise ConfigError(
                f"{out} holds no model to evaluate; train one first, without --evaluate-only"
            )
        checkpoint = open_checkpoint(out)
        sharing = Sharing(ranks, checkpoint.config)
        ops = TrainingOps(drops=not recipe.routing.dropless, device=device)
        dtype = getattr(torch, recipe.training.dtype)
        decoder = load_decoder(checkpoint, dtype, device, ops, ranks=sharing.experts)
        sharing.attach(decoder)
        for router in routers(decoder):
            router.limits = recipe.routing
        return decoder, sharing

    decoder, sharing = ranks.together(load)
    with tempfile.TemporaryDirectory() as folder:
        data = ranks.together(lambda: prepare(recipe, Path(folder), tokenizer=out))
        ranks.require_same(_text(data))
        return measure(decoder, recipe, data, sharing)
