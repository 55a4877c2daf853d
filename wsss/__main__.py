"""The command ``wsss``; ``python -m wsss`` is the same."""

import argparse
import os
import sys
from importlib import import_module

from pipeline import interrupts
from pipeline.errors import exit_on_faults

# OpenMP reads this when torch loads it; see ``stages``.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

COMMANDS = {  # name and help of each command; its module in this package has the rest
    "new": "write a profile for your own photos and tags",
    "run": "train on the photos of a profile, and write their masks",
    "predict": "segment new photos with a model file",
    "export": "export the masks of a trained row in the formats of other tools",
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Faults in the input are printed, and the exit status is 1; after Ctrl-C it is 130."""
    interrupts.listen()
    parser = argparse.ArgumentParser(prog="wsss", description="Masks of photos from image-level tags.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in (sys.argv[1:] if arguments is None else arguments) if word in COMMANDS), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == named:  # the modules of other commands are not imported
            module = import_module(f"wsss.{name}")
            command.epilog = module.EPILOG
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    with exit_on_faults():
        options = parser.parse_args(arguments)
        options.arguments = sys.argv[1:] if arguments is None else arguments
        sys.exit(options.run(options))


if __name__ == "__main__":
    main()
