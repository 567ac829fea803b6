"""The ``iumad`` command: parse, run one subcommand, print its result, turn mistakes into one sentence.

Every subcommand is a module of this package with two functions: ``run(args) -> result`` (a JSON-ready dict)
and ``show(result) -> text``. They are imported when needed, so that ``iumad --help`` does not load torch.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence

from iumad.cli.arguments import make_parser
from iumad.engine.files import strict


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code: 0 success, 1 the user's mistake, 2 usage.

    ``IUMAD_TRACEBACK=1`` shows where a mistake was noticed.
    """
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as leave:  # argparse has printed its message: 0 for --help, 2 for a usage error
        return int(leave.code or 0)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        command = importlib.import_module(f"iumad.cli.{args.command}")
        result = command.run(args)
        text = json.dumps(strict(result)) if args.json else command.show(result)
        if text and int(os.environ.get("RANK", "0")) == 0:
            print(text, flush=True)
        return int(result.get("exit_code", 0))
    except KeyboardInterrupt:
        print("iumad: interrupted; `iumad resume DIR` goes on with a training run", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("IUMAD_TRACEBACK") == "1":
            raise
        print(f"iumad: {_sentence(error)}", file=sys.stderr)
        return 1


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
