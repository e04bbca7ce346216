"""`python -m tools.train_demo`: prove the model, train, evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import evaluate, golden
from .train import Recipe, train

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("golden", help="compare the forward pass with tests/golden")
    for name, text in (
        ("train", "train, write the checkpoint, evaluate it"),
        ("evaluate", "evaluate a checkpoint"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("text", type=Path, help="a text file, or a folder of .txt files")
        command.add_argument("--folder", type=Path, default=ROOT / "manifests/demo", help="the checkpoint")
        if name == "train":
            command.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "golden":
        return 0 if golden.check(ROOT / "tests/golden") else 1
    if arguments.command == "train":
        train(arguments.text, arguments.folder, Recipe(steps=arguments.steps))
    print(evaluate.report(arguments.text, arguments.folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
