"""`python -m ddp_stream <command>`, also installed as `ddp-stream`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import record

from ddp_stream import debugging
from ddp_stream.commands import audit, checkpoint, demo, doctor, plan, train
from ddp_stream.commands.cli import Parser

COMMANDS = {"train": train, "plan": plan, "doctor": doctor, "audit": audit, "checkpoint": checkpoint, "demo": demo}


def main() -> NoReturn:
    """Parse the command line, run the command, and end with its exit code."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a task or a source of the user's own is beside where they stand
    debugging.begin(sys._getframe(), os.environ)
    try:
        code = _run()
    except (KeyboardInterrupt, Exception) as error:
        # A rank that failed ends here and now. Teardown may wait for peers that wait for us, and letting go of the
        # error would let go of the loader, which waits for its workers.
        traceback.print_exc()
        debugging.failed(error, os.environ)
        _leave(1)
    if code:
        _leave(code)
    sys.exit(0)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@record
def _run() -> int:
    parser = Parser(prog="ddp-stream", description="Distributed training on every row exactly once, with proof.")
    commands = parser.add_subcommands(required=True, dest="command")
    parsers = {name: command.parser() for name, command in COMMANDS.items()}
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, parsers[name], help=(command.__doc__ or "").partition(": ")[2])
    arguments = parser.parse_args()
    name = arguments["command"]
    code: int = COMMANDS[name].run(parsers[name], arguments[name])
    return code


if __name__ == "__main__":
    main()
