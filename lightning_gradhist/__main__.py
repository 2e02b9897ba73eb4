"""The command ``gradhist``, or ``python -m lightning_gradhist``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from lightning_gradhist.noise.run_record import RunRecord
from lightning_gradhist.plan import plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status: 2 where its input cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        plans = plan(RunRecord.load(options.record), options.batch_size, options.steps)
        if options.save:
            from lightning_gradhist.logging.figures import plan_figure

            plan_figure(plans[0]).savefig(options.save)
    except (ValueError, OSError, ImportError) as error:
        print(f"gradhist plan: {error}", file=sys.stderr)
        return 2
    as_json = json.dumps([found.to_json() for found in plans], indent=1) if options.json else None
    try:
        print(as_json or "\n\n".join(found.to_text() for found in plans), flush=True)
    except BrokenPipeError:  # as of head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes the rest at its end
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradhist", description="What a recorded run says of the next one.")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "plan",
        help="learning rate, steps and samples at other batch sizes, without training",
        description="Learning rate, steps and samples to the same loss at other batch sizes, from the record of one run.",
    )
    add = command.add_argument
    add("record", metavar="RECORD", help="calibration.json in the log directory of a run, or its URL")
    add("--batch-size", type=float, nargs="+", required=True, help="samples of an optimizer step")
    add("--steps", type=int, help="length of the run at the recorded batch size; default: the record's")
    add("--json", action="store_true", help="print JSON in place of a table")
    add("--save", metavar="FILE", help="draw a figure, too; its ending says the format (png, pdf, svg)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
