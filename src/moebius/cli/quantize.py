"""moebius quantize: a model as a GGUF file, for llama.cpp and all that builds on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebius.cli import options as o

if TYPE_CHECKING:
    from moebius.quantize.export import Written


@o.options_of("which", o.ModelOptions, "file")
def quantize(
    which: o.ModelOptions,
    model: o.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    type_: Annotated[
        str,
        typer.Option(
            "--type",
            help="What weights become: q8_0, q6_k, q5_k_m, q4_k_m or mxfp4; plain numbers: bf16, "
            "f16 or f32.",
        ),
    ] = "q4_k_m",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a GGUF file that is there.")
    ] = False,
) -> None:
    """Write a model as a GGUF file, in fewer bits.

    llama.cpp and what builds on it load the file; `moebius serve OUT.gguf` does too.
    """
    from moebius.cli.border import ended_in_order
    from moebius.progress import bytes_bar
    from moebius.quantize.export import write_model

    name = model.rstrip("/").rpartition("/")[2]
    source = which.find(model).path
    with ended_in_order():
        found = write_model(source, out, type_.lower(), name=name, force=force, progress=bytes_bar)
    typer.echo(_summary(out, found))


def _summary(out: Path, found: "Written") -> str:
    """The whole, then a line a type of tensor."""
    lines = [
        f"{out}: {found.nbytes:,} bytes, {found.total.parameters:,} parameters, "
        f"{found.bits:.2f} bits each"
    ]
    by_size = sorted(found.by_type.items(), key=lambda entry: -entry[1].nbytes)
    for kind, each in by_size:
        share = f"{100 * each.parameters / found.total.parameters:.1f} % of parameters"
        lines.append(f"  {kind:<5} {each.nbytes:>15,} bytes in {each.tensors} tensors, {share}")
    return "\n".join(lines)
