"""`python -m tools.train_dspark train|evaluate TEXT`: train a DSpark head for the demo's backbone; give its figures."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from . import evaluate
from .train import Recipe, train

DEMO = Path(__file__).parents[2] / "manifests" / "demo"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_dspark", description=__doc__)
    parser.add_argument("command", choices=["train", "evaluate"])
    parser.add_argument("text", type=Path, help="a text file, or a folder of .txt files")
    parser.add_argument("--folder", type=Path, default=DEMO / "dspark", help="where the head is written, or lies")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--start", type=Path, help="go on from the head that was written to this folder")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help="factor on all learning rates")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="which rows of text are drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "train":
        recipe = Recipe(steps=arguments.steps, rate=arguments.rate, seed=arguments.seed)
        if arguments.start:  # the first part of a whole run is behind
            recipe = dataclasses.replace(recipe, on_grids=0.0, divergence=0.5)
        train(arguments.text, DEMO, arguments.folder, recipe, lambda line: print(line, flush=True), arguments.start)
    print(evaluate.report(arguments.text, DEMO, arguments.folder))


if __name__ == "__main__":
    main()
