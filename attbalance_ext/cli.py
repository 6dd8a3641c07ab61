"""The ``attbalance`` command. Its commands, ``info`` excepted, need the extra ``train``: see ``grounding/commands``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a mistake that the user can correct is one line on stderr and exit code 2."""
    try:
        from attbalance_ext.grounding.commands import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("attbalance_ext"):
            raise
        if sys.argv[1:2] == ["info"]:
            from attbalance_ext.info import main as info

            raise SystemExit(info(sys.argv[2:])) from None
        print(
            f"attbalance: the command line needs {error.name!r}: pip install 'attbalance_ext[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    raise SystemExit(run())


if __name__ == "__main__":
    main()
