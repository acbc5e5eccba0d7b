"""The console command `adpretrain`: its parser, and how it reports errors.

Results go to stdout, everything else (progress, warnings, errors) to stderr. A user's mistake prints one line to
stderr and exits with code 2; our own bugs print a traceback and exit with 70, a code that no command gives another
meaning.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from adpretrain.parsing import YAML
from downstream.commands import COMMANDS, command_class
from downstream.commands.options import help_of, usage_error
from downstream.terminal import lines, one_line_warnings, plain

EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED, EXIT_PIPE = 2, 70, 130, 141


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The formatter of jsonargparse, except that the table of exit codes keeps its line breaks."""


class _Parser(ArgumentParser):
    """The parser of jsonargparse, with one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        asked = getattr(ex, "subcommand_parser", None) or self
        for action in self._actions:  # the main parser reports a command's missing option: "... required: score.normal"
            if isinstance(action.choices, dict):
                asked = action.choices.get(message.rpartition(": ")[2].partition(".")[0], asked)
        options = [name for action in asked._actions for name in action.option_strings if name.startswith("--")]
        command = asked.prog.replace(" [options]", "")
        print(f"{command}: error: {plain(usage_error(message, options))}; see {command} --help", file=sys.stderr)
        self.exit(EXIT_USAGE)


def main(argv: list[str] | None = None, **process: Any) -> int:
    """Run one command and return its exit code (2 for a user's mistake). ``process`` holds the arguments of `run` that
    a launcher of several processes sets (`commands.evaluate`)."""
    # Subparsers inherit the formatter and the mode of this parser.
    parser = _Parser(
        prog="adpretrain",
        description="Pretrained features for industrial anomaly detection.",
        formatter_class=_HelpFormatter,
        parser_mode=YAML,
    )
    parser.add_argument("--version", action="version", version=f"adpretrain {version('adpretrain')}")
    subcommands = parser.add_subcommands(metavar="command", required=True)
    arguments = sys.argv[1:] if argv is None else argv
    asked = [name for name in arguments[:1] if name in COMMANDS] or COMMANDS  # without a command, the help lists all
    commands = {name: command_class(name) for name in asked}
    for name, command in commands.items():
        summary, epilog, _ = help_of(command)
        subparser = _Parser(description=summary, epilog=epilog or None)
        if command.from_file:
            subparser.add_argument("--config", action="config", help="YAML file with any of these options")
        command.add_to(subparser)
        subcommands.add_subcommand(name, subparser, help=summary)
    try:
        found = parser.parse_args(arguments)
    except SystemExit as stop:  # --help, --version or a usage error, already printed
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    try:
        with one_line_warnings("adpretrain: "):
            run: Callable[..., int] = commands[found.subcommand].parsed(found[found.subcommand]).run
            code = run(**process)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of stdout, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (ValueError, OSError) as error:
        print(f"adpretrain: error: {lines(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("adpretrain: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        # Python itself would exit with 1, which here means "an anomaly was found".
        traceback.print_exc()
        return EXIT_BUG


if __name__ == "__main__":
    sys.exit(main())
