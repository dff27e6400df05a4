"""Configuration: defaults in dataclasses, differences in one YAML file, overrides on the command line.

A command describes its configuration with a dataclass whose fields carry docstrings. The dataclass lives beside
the code that it configures; here is only what turns files and words into it. Precedence, lowest first: the
dataclass, ``--config file.yaml`` (repeatable), ``--some.key value`` (or the bare ``some.key=value``). Keys may be
written with hyphens (``--words-file``), and ``--key`` alone says true of one that is true or false. A file below
``configs/`` that the current folder does not have is the one that comes with the package.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from pacl_scale.errors import UserError
from pacl_scale.secrecy import key_of_secret

Config = TypeVar("Config")

SHIPPED = Path(__file__).parent / "configs"
"""The configurations that come with the package. In a checkout this is a link to its ``configs/``."""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser(
    config_class: type[Config],
    prog: str,
    positionals: Sequence[tuple[str, dict[str, Any]]] = (),
    file_option: str = "--config",
) -> ArgumentParser:
    """The parser of one command: ``--help`` lists every key of ``config_class`` with its docstring and default."""
    words = "".join(f" {name.upper()}{'...' if options.get('nargs') else ''}" for name, options in positionals)
    parser = ArgumentParser(
        prog=prog,
        # The generated usage would list every key before the list of every key.
        usage=f"%(prog)s{words} [{file_option} FILE] [--key VALUE | key=VALUE ...]",
        description=(config_class.__doc__ or "").strip(),
        exit_on_error=False,
        print_config="--print-config",
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument(file_option, action="config", help="YAML file of differences from the defaults.")
    for name, options in positionals:
        parser.add_argument(name, **options)
    parser.add_class_arguments(config_class)
    return parser


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None,
    prog: str,
    positionals: Sequence[tuple[str, dict[str, Any]]] = (),
    file_option: str = "--config",
) -> Any:
    """Parse ``argv`` into a ``config_class``.

    Args:
        config_class: a dataclass, possibly of dataclasses; every field has a default or is required.
        argv: the words after the command's name; ``None`` takes them from ``sys.argv``.
        prog: the command's name as the user types it.
        positionals: extra positional arguments, each a name and the keywords of ``add_argument``.
        file_option: the option that names a YAML file, for a command that hands ``--config`` on to another.

    Returns:
        The configuration; with ``positionals``, a tuple of it and a ``{name: value}`` dictionary.

    Raises:
        UserError: unknown key, wrong type, unreadable file, a secret (:mod:`pacl_scale.secrecy`), or a combination
            that the dataclass refuses by raising ``ValueError`` in ``__post_init__``.
    """
    import sys

    words = _with_shipped_files(sys.argv[1:] if argv is None else argv, file_option)
    parser = build_parser(config_class, prog, positionals, file_option)
    try:
        namespace = parser.parse_args(_as_options(words, parser, config_class))
        extras = {name: getattr(namespace, name) for name, _ in positionals}
        values = parser.instantiate(namespace)
        fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
        config = config_class(**fields)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{_one_line(error)} ({prog} --help lists every key)") from error
    if key := key_of_secret(to_dict(config)):
        raise UserError(
            f"{key} holds a secret, and settings are written to run directories and logs; "
            "leave it to the environment or the service's own file (~/.aws/credentials)"
        )
    return (config, extras) if positionals else config


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, keys in the order of the dataclass."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys on which two resolved configurations differ, with the old and the new value."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after and list(_flat(before)) != list(_flat(after)):
            found[prefix + key] = (before, after)
    return found


def _flat(value: Any) -> Sequence[Any]:
    # YAML has no tuples: a tuple saved and read again is a list, and that is no difference.
    return list(value) if isinstance(value, (list, tuple)) else [value]


def shipped(name: str) -> str:
    """``name``, unless it is a file below ``configs/`` that only the package has: then where that one lies."""
    own = SHIPPED / name.removeprefix("configs/")
    return str(own) if name.startswith("configs/") and not os.path.exists(name) and own.is_file() else name


def _with_shipped_files(words: Sequence[str], file_option: str) -> list[str]:
    found: list[str] = []
    for word in words:
        option, equals, name = word.partition("=")
        if found and found[-1] == file_option:
            found.append(shipped(word))
        else:
            found.append(f"{option}={shipped(name)}" if equals and option == file_option else word)
    return found


def _as_options(words: Sequence[str], parser: ArgumentParser, config_class: type[Any]) -> list[str]:
    """The words as the parser knows them.

    ``some.key=value`` is short for ``--some.key=value``; a file of that name stays a file. A key may be written with
    hyphens, and ``--key`` alone says true of a key that is true or false.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    switches = {f"--{key}" for key in _switches(config_class)}
    found = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        key, equals, value = word.partition("=")
        if equals and all(part.isidentifier() for part in key.split(".")) and not os.path.exists(word):
            key = f"--{key}"
        plain = f"--{key.removeprefix('--').replace('-', '_')}"
        if key not in known and plain in known and (key.startswith("--") or equals):
            key = plain
        if key in switches and not equals and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        found.append(key + equals + value)
    return found


def _switches(config_class: type[Any], prefix: str = "") -> list[str]:
    """Dotted keys that are true or false."""
    types = get_type_hints(config_class)
    found = []
    for field in dataclasses.fields(config_class):
        kind = types[field.name]
        if kind is bool:
            found.append(prefix + field.name)
        elif dataclasses.is_dataclass(kind):
            found += _switches(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return found


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return message.replace(f"{Path.cwd()}{os.sep}", "").rstrip(".")
