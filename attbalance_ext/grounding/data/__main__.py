"""``python -m attbalance_ext.grounding.data``: statistics and export of the built-in benchmark."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import FORMATS, UnknownData, card, export


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns 2 for a name that does not exist, after one line that says which do."""
    parser = argparse.ArgumentParser(prog="python -m attbalance_ext.grounding.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("card", "print statistics as JSON"), ("export", "write images and annotations")):
        sub = commands.add_parser(command, help=text)
        sub.add_argument("name", help="for example builtin:refcoco or builtin:referit-hard")
        sub.add_argument("--size", type=int, default=64, help="side of the images in pixels, 64 (default) or 128")
        sub.add_argument("--cache", type=Path, help="directory for generated data")
        if command == "export":
            sub.add_argument("root", type=Path, help="directory to write to")
            sub.add_argument("--format", default=FORMATS[0], help=f"{', '.join(FORMATS)} (default {FORMATS[0]})")
    options = parser.parse_args(arguments)
    try:
        if options.command == "card":
            print(json.dumps(card(options.name, cache=options.cache, size=options.size), indent=1))
        else:
            print(export(options.name, options.root, options.format, cache=options.cache, size=options.size))
    except UnknownData as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
