"""What the commands share: the parser over the dataclasses, and errors that help."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from typing import Any

import jsonargparse

from ddp_stream.training.task import Task

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(jsonargparse.ArgumentParser):
    """Suggests the right name for one that does not exist."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # an abbreviation is a mistyped name that got away

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print `message`, the nearest option if a name was wrong, and exit with 2."""
        parsers = self._all(message)
        known = [option[2:] for parser in parsers for option in parser._option_string_actions if option[:2] == "--"]
        wrong = re.findall(r"--([\w.+-]+)", message) if "nrecognized arguments" in message else []
        wrong += re.findall(r"does not accept option '([\w.]+)'", message)
        for path, name in re.findall(r"class_path '([\w.]+)'.*?Option '([\w.]+)' is not accepted", message, re.DOTALL):
            key = re.search(r"[Kk]ey \"([\w.]+)\"", message)
            prefix = f"{key[1]}." if key else ""
            known += [f"{prefix}{argument}" for argument in _arguments(path)]
            wrong.append(f"{prefix}{name}")
        for name in wrong:
            near = difflib.get_close_matches(name, known, n=1)
            if near:
                message += f"\n  {name} is unknown; did you mean --{near[0]}?"
        super().error(message, ex)

    def _all(self, message: str) -> list[jsonargparse.ArgumentParser]:
        """The parsers that `message` may speak of: that of the command it names, or this one and those of all its."""
        action = getattr(self, "_subcommands_action", None)
        commands: dict[str, jsonargparse.ArgumentParser] = action._name_parser_map if action is not None else {}
        named = re.search(r"Subcommand '(\w+)'", message)
        return [commands[named[1]]] if named and named[1] in commands else [self, *commands.values()]


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


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
