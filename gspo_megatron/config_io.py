"""Settings in and out: strict TOML, `--section.key value` overrides, the resolved file, the reference of all keys.

The dataclasses of `config` are the only definition; names, types, defaults and help are read from them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomlkit

from gspo_megatron.config import MeasureConfig, SftConfig, TrainConfig
from gspo_megatron.errors import UserError, nearest

Config = TypeVar("Config", TrainConfig, SftConfig, MeasureConfig)

_HELP_FLAGS = ("-h", "--help")


# ---------------------------------------------------------------------------------------------------------------------
# What the dataclasses say
# ---------------------------------------------------------------------------------------------------------------------


def sections(cls: type) -> dict[str, type]:
    """Section name → its dataclass, in order of definition."""
    return dict(typing.get_type_hints(cls))


def field_types(section: type) -> dict[str, Any]:
    """Field name → its type, resolved."""
    return typing.get_type_hints(section)


def field_help(section: type) -> dict[str, str]:
    """Field name → the text under the field in the source, base classes included."""
    texts: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if dataclasses.is_dataclass(cls):
            texts |= _own_field_help(cls)
    return texts


@functools.cache
def _own_field_help(section: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            texts[statement.target.id] = following.value.value
    return texts


def _is_table(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a type that is none is its only member."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def type_name(hint: Any) -> str:
    """A type as a user would say it: 'an integer', 'one of "weights", "random"'."""
    names = []
    for option in _alternatives(hint):
        if option is type(None):
            continue
        if typing.get_origin(option) is Literal:
            names.append("one of " + ", ".join(f'"{choice}"' for choice in typing.get_args(option)))
        elif _is_table(option):
            names.append("a table")
        else:
            names.append({bool: "true or false", int: "an integer", float: "a number", str: "a string"}[option])
    return " or ".join(names)


def _default(field: Field[Any]) -> Any:
    """The field's default, or MISSING."""
    return field.default if field.default_factory is MISSING else field.default_factory()


# ---------------------------------------------------------------------------------------------------------------------
# TOML → plain values
# ---------------------------------------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises UserError if it cannot be read or parsed; the parser's message has the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist.{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config file {path} is not valid TOML: {error}") from None


def _nearest_file(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, (p.name for p in folder.glob("*.toml"))) if folder.is_dir() else ""


def _convert(key: str, value: Any, hint: Any) -> Any:
    """A TOML value as the field's type. An integer is taken for a number, a boolean never for an integer."""
    for option in _alternatives(hint):
        if typing.get_origin(option) is Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
        elif _is_table(option):
            if isinstance(value, dict):
                element = typing.get_args(option)[1]
                return {name: _convert(f"{key}.{name}", item, element) for name, item in value.items()}
        elif type(value) is option:
            return value
    # Only now: where a table's element may be an integer or a number, 3 stays an integer.
    if float in _alternatives(hint) and type(value) is int:
        return float(value)
    raise _wrong_type(key, value, hint)


def _wrong_type(key: str, value: Any, hint: Any) -> UserError:
    shown = repr(value) if not isinstance(value, bool) else str(value).lower()
    choices = [c for option in _alternatives(hint) for c in typing.get_args(option) if isinstance(c, str)]
    hint_text = nearest(value, choices) if isinstance(value, str) else ""
    return UserError(f"{key}={shown} must be {type_name(hint)}.{hint_text}".removesuffix("."))


def _from_toml(cls: type, tables: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Section → field → value for what the file sets."""
    values: dict[str, dict[str, Any]] = {}
    for section, table in tables.items():
        if section not in sections(cls):
            raise UserError(f"{path}: {_unknown_section(cls, section, isinstance(table, dict))}")
        if not isinstance(table, dict):
            raise UserError(f"{path}: {section}={table!r} must be a table: write [{section}] and its keys below it")
        hints = field_types(sections(cls)[section])
        values[section] = {}
        for key, value in table.items():
            if key not in hints:
                raise UserError(f"{path}: {_unknown_key(cls, section, key)}")
            values[section][key] = _convert(f"{section}.{key}", value, hints[key])
    return values


def _unknown_section(cls: type, section: str, is_table: bool) -> str:
    if not is_table:
        return f'unknown key "{section}" outside a section.{_owner(cls, section) or nearest(section, sections(cls))}'
    return f"unknown section [{section}].{nearest(section, sections(cls))} Known: {', '.join(sections(cls))}"


def _unknown_key(cls: type, section: str, key: str) -> str:
    known = field_types(sections(cls)[section])
    hint = nearest(key, known) or _owner(cls, key) or _other_command(cls, section, key)
    return f'unknown key "{key}" in section [{section}].{hint or " Known: " + ", ".join(known)}'


def _owner(cls: type, key: str) -> str:
    """' It belongs to section [x].' where another section has the key."""
    owners = [f"[{name}]" for name, section in sections(cls).items() if key in field_types(section)]
    return f" It belongs to section {' or '.join(owners)}." if owners else ""


def _other_command(cls: type, section: str, key: str) -> str:
    """' Only train reads it; remove it.' where the other command's config has the key in this section."""
    other, name = (TrainConfig, "train") if cls is SftConfig else (SftConfig, "sft")
    found = section in sections(other) and key in field_types(sections(other)[section])
    return f" Only `{name}` reads it; remove it." if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# --section.key value → plain values
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Override:
    section: str
    key: str
    entry: str | None  # the key inside a table, for --section.key.entry
    text: str


def _split_overrides(cls: type, tokens: Sequence[str]) -> list[_Override]:
    """`--a.b c`, `--a.b=c` and a bare `--a.b` of a boolean. Raises UserError for unknown names, with the nearest."""
    overrides = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise UserError(f'unexpected argument "{token}"; overrides are written --section.key value')
        flag, has_value, text = token.partition("=")
        section, key, entry = _resolve_flag(cls, flag)
        hint = field_types(sections(cls)[section])[key]
        if not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif hint is bool:
                text = "true"
            else:
                raise UserError(f"{flag} needs a value: {'any scalar' if entry else type_name(hint)}")
        overrides.append(_Override(section, key, entry, text))
    return overrides


def _resolve_flag(cls: type, flag: str) -> tuple[str, str, str | None]:
    """--section.key or --section.table.entry → its parts."""
    parts = flag.removeprefix("--").split(".", 2)
    section = parts[0].replace("-", "_")
    if len(parts) > 1 and section in sections(cls):
        key = parts[1].replace("-", "_")
        hint = field_types(sections(cls)[section]).get(key)
        if hint is not None and _is_table(hint):
            if len(parts) == 3 and parts[2]:
                return section, key, parts[2]
            raise UserError(f"{flag} is a table; set its entries one by one: {flag}.NAME VALUE")
        if hint is not None and len(parts) == 2:
            return section, key, None
    known = [f"--{name}.{key}" for name, part in sections(cls).items() for key in field_types(part)]
    same_key = [name for name in known if name.rpartition(".")[2] == parts[-1].replace("-", "_")]
    hint_text = f" Did you mean {' or '.join(same_key)}?" if same_key else nearest(flag, known)
    if len(parts) == 2 and not same_key:
        hint_text = _other_command(cls, parts[0], parts[1].replace("-", "_")) or hint_text
    raise UserError(f'unknown option "{flag}".{hint_text} `--help` lists all')


def _scalar(text: str) -> Any:
    """The text as TOML would read it, and as a string where TOML would not."""
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = document["value"]
    return value if len(document) == 1 and isinstance(value, bool | int | float | str) else text


def _section_parser(name: str, section: type) -> type:
    """A dataclass for tyro with the section's fields and help but none of its checks.

    tyro would turn an error of `__post_init__` into a page of its own; here the checks run once, on the final
    values, after the file and the overrides are merged.
    """
    import tyro

    parser_fields = []
    for field in dataclasses.fields(section):
        hint = field_types(section)[field.name]
        help_text = field_help(section).get(field.name, "").replace("%", "%%")
        if _is_table(hint):
            argument = tyro.conf.arg(name=f"{field.name}.NAME", metavar="VALUE", help=help_text)
            parser_fields.append((field.name, Annotated[str, argument], dataclasses.field(default="{}")))
            continue
        default = _default(field)
        parser_fields.append(
            (
                field.name,
                Annotated[hint, tyro.conf.arg(help=help_text)],
                dataclasses.field(default=tyro.MISSING if default is MISSING else default),
            )
        )
    parser = dataclasses.make_dataclass(name, parser_fields, frozen=True)
    parser.__doc__ = section.__doc__
    return parser


def _parser(cls: type) -> type:
    parsers = {name: _section_parser(name, section) for name, section in sections(cls).items()}
    parser = dataclasses.make_dataclass(
        cls.__name__, [(name, part, dataclasses.field(default_factory=part)) for name, part in parsers.items()]
    )
    parser.__doc__ = cls.__doc__
    return parser


def _parse(cls: type, overrides: Sequence[_Override]) -> Any:
    """tyro's reading of the overrides, or None where it refuses one."""
    import tyro

    arguments = []
    for override in overrides:
        hint = field_types(sections(cls)[override.section])[override.key]
        text = override.text
        if bool in _alternatives(hint) and text.lower() in ("true", "false"):
            text = text.capitalize()
        if type(None) in _alternatives(hint) and text.lower() in ("none", "null", "unset"):
            text = "None"
        arguments.append(f"--{override.section}.{override.key}={text}")
    # Required fields may come from the file: anything will do here, only the overridden fields are read.
    given = {(o.section, o.key) for o in overrides}
    for name, section in sections(cls).items():
        for field in dataclasses.fields(section):
            if _default(field) is MISSING and (name, field.name) not in given:
                arguments.append(f"--{name}.{field.name}=-")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return tyro.cli(
                _parser(cls),
                args=arguments,
                prog="",
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                add_help=False,
            )
        except SystemExit:
            return None


def _from_overrides(cls: type, overrides: Sequence[_Override]) -> dict[str, dict[str, Any]]:
    """Section → field → value for what the command line sets."""
    plain = [o for o in overrides if o.entry is None]
    parsed = _parse(cls, plain) if plain else None
    if plain and parsed is None:
        for override in plain:
            if _parse(cls, [override]) is None:
                hint = field_types(sections(cls)[override.section])[override.key]
                raise _wrong_type(f"--{override.section}.{override.key}", override.text, hint)
        raise AssertionError(f"each of {plain} can be read, but not all together")
    values: dict[str, dict[str, Any]] = {}
    for override in overrides:
        table = values.setdefault(override.section, {})
        if override.entry is None:
            table[override.key] = getattr(getattr(parsed, override.section), override.key)
        else:
            table.setdefault(override.key, {})[override.entry] = _scalar(override.text)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Public
# ---------------------------------------------------------------------------------------------------------------------


def load_config(cls: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `--section.key value` overrides and check the result.

    Args:
        cls: TrainConfig, SftConfig or MeasureConfig.
        path: the TOML file, one table per section.
        overrides: command-line tokens: `--section.key value`, `--section.key=value`, a bare `--section.key` for
            true, `--task.params.NAME value` for one entry of a table, `none` for a field that may be unset.

    Raises:
        UserError: the file is missing or malformed, a section or key is unknown, a value has the wrong type or
            is refused by the dataclass, a required field is set in neither place.
    """
    values = _from_toml(cls, read_toml(path), path)
    for section, table in _from_overrides(cls, _split_overrides(cls, overrides)).items():
        target = values.setdefault(section, {})
        for key, value in table.items():
            target[key] = {**target.get(key, {}), **value} if isinstance(value, dict) else value
    missing = [
        f"{name}.{field.name}"
        for name, section_type in sections(cls).items()
        for field in dataclasses.fields(section_type)
        if _default(field) is MISSING and field.name not in values.get(name, {})
    ]
    if missing:
        example = missing[0].partition(".")
        raise UserError(
            f"{path}: {', '.join(missing)} must be set; e.g. [{example[0]}] {example[2]} = … in the file, "
            f"or --{missing[0]} … on the command line"
        )
    return cls(**{name: section_type(**values.get(name, {})) for name, section_type in sections(cls).items()})


def dump_config(config: TrainConfig | SftConfig) -> str:
    """The config as TOML that `load_config` reads back equal. Unset fields are comments."""
    document = tomlkit.document()
    for name in sections(type(config)):
        section = getattr(config, name)
        table = tomlkit.table()
        # A sub-table ends the section's own keys in TOML, so tables come last.
        for field in sorted(dataclasses.fields(section), key=lambda f: isinstance(getattr(section, f.name), dict)):
            value = getattr(section, field.name)
            if value is None:
                table.add(tomlkit.comment(f"{field.name} is unset"))
            else:
                table.add(field.name, tomlkit.item(value))
        document.add(name, table)
    return tomlkit.dumps(document)


def wants_help(tokens: Sequence[str]) -> bool:
    """Whether the arguments ask for help."""
    return any(token in _HELP_FLAGS for token in tokens)


def print_help(cls: type, prog: str, description: str) -> None:
    """Print every option with type, default and help to stdout."""
    import tyro

    if not sys.stdout.isatty():
        tyro._experimental_options["utf8_boxes"] = False
        tyro._experimental_options["ansi_codes"] = False
    with contextlib.suppress(SystemExit):
        tyro.cli(
            _parser(cls),
            args=["--help"],
            prog=prog,
            description=description,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )


def _literal(value: Any) -> str:
    """A value as TOML writes it; '—' for an unset one."""
    if value is MISSING:
        return "required"
    if value is None:
        return "unset"
    return f"`{tomlkit.item(value).as_string()}`" if value != {} else "`{}`"


def render_reference() -> str:
    """docs/configuration.md: every section and key with type, default and help."""
    train, sft, measure = sections(TrainConfig), sections(SftConfig), sections(MeasureConfig)
    lines = [
        "# Configuration",
        "",
        "A command reads one TOML file with one table per section. Every key can be overridden on the command line as",
        "`--section.key value`; an entry of a table as `--task.params.NAME value`. Unknown keys are refused.",
        "This page is printed by `python -m gspo_megatron settings`; a test keeps it equal to the code.",
    ]
    further = {n: s for n, s in {**sft, **measure}.items() if n not in train}
    for name, section in {**train, **further}.items():
        commands = [c for c, known in (("train", train), ("sft", sft)) if name in known] or ["measure"]
        used_by = "" if len(commands) == 2 else f" Only for `{commands[0]}`."
        lines += ["", f"## [{name}]", "", f"{section.__doc__}{used_by}", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for field in dataclasses.fields(section):
            help_text = " ".join(field_help(section).get(field.name, "").split()).replace("|", "\\|")
            kind = type_name(field_types(section)[field.name])
            if len(commands) == 2 and field.name not in field_types(sft[name]):
                help_text += " Only for `train`."
            lines.append(f"| `{field.name}` | {kind} | {_literal(_default(field))} | {help_text} |")
    return "\n".join(lines) + "\n"
