"""What the commands share: the parser over the dataclasses, and errors that help."""

from __future__ import annotations

import difflib
import re
from typing import Any

import jsonargparse

from ddp_stream.training.task import Task

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(jsonargparse.ArgumentParser):
    """Suggests the right name for one that does not exist."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print `message`, the nearest option if a name was wrong, and exit with 2."""
        known = [option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"]
        wrong = re.findall(r"--([\w.+-]+)", message) if "nrecognized arguments" in message else []
        wrong += re.findall(r"[Kk]ey[s]? ['\"]?([\w.]+)['\"]? (?:is|are) not expected", message)
        wrong += re.findall(r"[Nn]o action for key ['\"]([\w.]+)['\"]", message)
        for name in wrong:
            near = difflib.get_close_matches(name, known, n=1)
            if near:
                message += f"\n  {name} is unknown; did you mean --{near[0]}?"
        super().error(message, ex)


def make_parser(config: type, *, task: bool) -> Parser:
    """A parser for the dataclass `config`, from YAML files (`--config`) and dotted options."""
    parser = Parser(description=config.__doc__, usage="%(prog)s [--config FILE.yaml] [--NAME VALUE ...]")
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_class_arguments(config, skip={"task"})
    if task:
        parser.add_subclass_arguments(
            Task,
            "task",
            help="what to train, by import path, with its arguments as --task.NAME",
        )
        parser.set_defaults(task={"class_path": "ddp_stream.tasks.Regression", "init_args": {"label": "label"}})
    return parser
