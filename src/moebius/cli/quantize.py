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
        typer.Option("--type", help="q8_0, q6_k, q5_k_m, q4_k_m, mxfp4, or bf16, f16, f32."),
    ] = "q4_k_m",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a GGUF file that is there.")
    ] = False,
) -> None:
    """Write a model as a GGUF file, in fewer bits.

    llama.cpp and what builds on it load the file; `moebius serve OUT.gguf` does too.
    """
    from moebius.quantize.bar import bytes_bar
    from moebius.quantize.export import write_model

    name = model.rstrip("/").rpartition("/")[2]
    found = write_model(
        which.find(model).path, out, type_.lower(), name=name, force=force, progress=bytes_bar
    )
    typer.echo(_summary(out, found))


def _summary(out: Path, found: "Written") -> str:
    """The whole, then a line a type of tensor."""
    lines = [
        f"{out}: {found.nbytes:,} bytes, {found.parameters:,} parameters, "
        f"{found.bits:.2f} bits each"
    ]
    by_size = sorted(found.by_type.items(), key=lambda entry: -entry[1][2])
    for kind, (tensors, numbers, nbytes) in by_size:
        share = f"{100 * numbers / found.parameters:.1f} % of parameters"
        lines.append(f"  {kind:<5} {nbytes:>15,} bytes in {tensors} tensors, {share}")
    return "\n".join(lines)
