"""`calibrate`: how strong each input column of each matrix is on a text, for rounding to weigh errors by."""

from __future__ import annotations

from pathlib import Path

import click

from ds4convert.choices import FILE, PATH
from ds4convert.cli.session import Session, cli, common, local
from ds4convert.errors import InputError


@cli.command()
@click.argument("src")
@click.argument("text", type=FILE)
@click.argument("out", type=PATH)
@click.option("--max-tokens", type=click.IntRange(2), default=32768, show_default=True, help="Tokens of TEXT to use.")
@click.option(
    "--sequence", type=click.IntRange(2), default=1024, show_default=True, help="Tokens that are run together."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
              help="Precision of the computation.")  # fmt: skip
@common()
def calibrate(session: Session, src: str, text: Path, out: Path, max_tokens: int, sequence: int, dtype: str) -> None:
    """Run TEXT through SRC, a checkpoint or a converted folder, and write what goes into each matrix to OUT.

    One layer is in memory at a time. Give OUT to `quantize --calibration OUT`.

    \b
    Example: ds4convert calibrate DeepSeek-V4-Flash-mlx book.txt flash.calibration.safetensors
    """
    from ds4convert import calibration, generation
    from ds4convert.inference import calibrate as collecting
    from ds4convert.inference.layerwise import work_bytes
    from ds4convert.inspection import inventory_of

    folder = local(src)
    inventory = inventory_of(folder)
    try:
        words = text.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{text}: not UTF-8 text: {e}") from None
    ids = generation.read_tokenizer(folder, set()).encode(words)[:max_tokens]
    prompts = [ids[n : n + sequence] for n in range(0, len(ids), sequence)]
    prompts = [p for p in prompts if len(p) >= 2]
    if not prompts:
        raise InputError(f"{text}: {len(ids)} tokens; expected at least 2, some thousands for a good calibration")
    with session.progress(work_bytes(folder), "calibrating") as progress:
        found = collecting.collect(folder, prompts, dtype=dtype, progress=progress)
    tokens = sum(map(len, prompts))
    size = calibration.write(out, inventory, found, tokens)
    facts = {"file": str(out), "bytes": size, "tokens": tokens, "matrices": len(found)}
    session.emit(facts, f"{len(found):,} matrices over {tokens:,} tokens: {out}")
