"""Settings and JSON lines: what every script needs and no method depends on. Only stdlib.

A script has one frozen dataclass. It is the list of defaults, the command line and the saved record:

    @dataclass(frozen=True)
    class Config:
        data: str = option(REQUIRED, "JSONL file to train on")
        ops: tuple[int, int] = option((15, 20), "operations of a problem")  # --ops 15-20, or --ops 20
        learning_rate: float = option(1e-6, "AdamW learning rate")          # --learning-rate 1e-6
        mask_prompt: bool = option(True, "train on completions only")       # --mask-prompt, --no-mask-prompt

    def main(config): ...

    if __name__ == "__main__":
        sys.exit(run_main(main, Config))

There are no config files, no overrides from the environment, no logging framework: `run_folder.Run.log` prints during
training.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from minibridge import strictjson

REQUIRED = dataclasses.MISSING  # default of an option that the command line must give
MOST = 2**53  # largest number of any option: JSON readers keep whole numbers exactly up to here
OUTPUT_OPTIONS = ("out", "json")  # options that name what is written
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


class InputError(Exception):
    """What a user can mend, mostly a wrong file or flag; the message is one line that names the file, field or line."""


def option(default: Any, help: str, least: float | None = None, most: float = MOST) -> Any:
    """A dataclass field with its line of --help; `parse` refuses a number below `least` or above `most`, one that is
    not finite, and an empty text. `Literal[...]` as the field's type gives choices."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most})


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)  # its own: no -1e-3

    def error(self, message: str) -> typing.NoReturn:  # argparse would print the whole usage and exit
        raise InputError(f"{message} (see --help)")


def parse(cls: type, argv: Sequence[str] | None = None) -> Any:
    """Defaults of the dataclass `cls` overridden by `argv` (default: the process's own arguments).

    Field types: bool, int, float, str, Literal[...], tuple[int, int] (a range), and all but bool also
    with `| None`, which the word "none" gives. Bad arguments raise InputError; --help prints and exits.
    """
    parser = _Parser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        parser.add_argument("--" + field.name.replace("_", "-"), **_argument(field, hints[field.name]))
    config = cls(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(cls):
        _check(field, getattr(config, field.name))
    return config


def _check(field: dataclasses.Field, value: Any) -> None:
    least, most = field.metadata.get("least"), field.metadata.get("most", MOST)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{field.name}: {value} is not a finite number")
    if isinstance(value, (int, float)) and (value > most or least is not None and value < least):
        bound = f"at most {most}" if value > most else f"at least {least}"
        raise InputError(f"{field.name}: must be {bound}, not {value}")
    if isinstance(value, str) and (not value or strictjson.SURROGATE.search(value)):
        raise InputError(f"{field.name}: {value!r} is " + ("not UTF-8" if value else "empty"))
    if field.name in OUTPUT_OPTIONS and value is not None and ".." in (parts := Path(value).parts):
        before = Path(*parts[: max(n for n, part in enumerate(parts) if part == "..")])
        if not before.is_dir():  # once it were there, the path might be that of something else
            raise InputError(f"{field.name}: {value}: there is no folder {before}")


def _argument(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for one dataclass field."""
    required = field.default is REQUIRED
    note = "required" if required else f"default: {_shown(field.default)}"
    text = f"{field.metadata.get('help', '')} ({note})".replace("%", "%%")  # argparse formats the help with %
    keywords = {"help": text, "required": required, "default": None if required else field.default}
    if hint is bool:
        return keywords | {"action": argparse.BooleanOptionalAction}
    reader, choices = _reader(hint)
    metavar = "{" + ",".join(map(_shown, choices)) + "}" if choices else field.name.split("_")[-1].upper()
    return keywords | {"type": reader, "choices": choices, "metavar": metavar}


def _reader(hint: Any) -> tuple[Callable[[str], Any], Sequence | None]:
    """How to read one word as a value of type `hint`, and the values allowed, if they are few."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"unsupported option type {hint}")
        read, choices = _reader(inner[0])

        def read_optional(word: str) -> Any:
            return None if word.lower() == "none" else read(word)

        read_optional.__name__ = read.__name__  # argparse says "invalid <name> value"
        return read_optional, choices and [*choices, None]
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices
    if hint == tuple[int, int]:
        return parse_range, None
    if hint in (int, float, str):
        return hint, None
    raise TypeError(f"unsupported option type {hint}")


def parse_range(word: str) -> tuple[int, int]:
    """"15-20" -> (15, 20), both ends included; "20" -> (20, 20)."""
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word)
    if not match:
        raise argparse.ArgumentTypeError(f"{word[:40]!r} is not a whole number or a range such as 15-20")
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise argparse.ArgumentTypeError(f"the range {word} is empty: {low} is larger than {high}")
    return low, high


def _shown(value: Any) -> str:
    return "none" if value is None else "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run_main(main: Callable[[Any], Any], cls: type, argv: Sequence[str] | None = None) -> int:
    """Parse, call `main(config)`, return the `exit_status`."""
    return exit_status(lambda: main(parse(cls, argv)))


def exit_status(work: Callable[[], Any]) -> int:
    """Of a process that does `work`: 0 done, 2 bad input, no memory or disk trouble, 130 stopped, 141 when nobody reads the
    output any more. The user's mistakes end in one line on stderr, ours in a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a console with a small character set shows the rest as escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        work()
        _flush_output()  # what is wrong with it is found here, not while Python ends
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted: what was already written is whole", 130
    except InputError as error:
        message, status = f"error: {error}", 2
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        _drop_output()
        return 141  # as of a process that SIGPIPE ends
    except OSError as error:  # no permission, disk full: an open knows its filename, a write does not
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        message, status = f"error: {reason}", 2
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        lines = str(error).strip().splitlines() or ["out of memory"]
        message, status = f"error: no memory: {lines[0]} (to train or sample, lower --rows, --micro-tokens or lengths)", 2
    try:
        _flush_output()
    except OSError:
        _drop_output()
    print(printable(shortened(message)).replace("\n", r"\n"), file=sys.stderr)  # it may quote a file
    return status


def _flush_output():
    if sys.stdout is not None:  # as it is where the caller has closed it
        sys.stdout.flush()


def _drop_output():
    """What is still to be written to stdout goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def no_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(re.search("can't allocate memory|out of memory", str(error)))


def shortened(text: str) -> str:
    """A long text without its middle: a message's beginning says what is wrong, its end what to do."""
    return text if len(text) <= 500 else f"{text[:247]} ... {text[-247:]}"


def printable(text: str) -> str:
    """Escapes what is not printable, except newlines: a terminal would obey some of it."""
    return "".join(letter if letter == "\n" or letter.isprintable() else repr(letter)[1:-1] for letter in text)


def run_command(commands: dict[str, tuple[Callable[[Any], Any], type]]) -> int:
    """`run_main` for the command that the first argument names; --help alone shows what the module says of itself."""
    name, *argv = sys.argv[1:] or [""]
    if name in commands:
        return run_main(*commands[name], argv)
    asked, wanted = name in ("-h", "--help"), f"the first argument must be one of {', '.join(commands)}; each has a --help"
    print(f"{sys.modules['__main__'].__doc__}\n{wanted}" if asked else f"error: {wanted}",
          file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises InputError("path: reason")."""
    return _read_object(_contents(path), str(path))


def _contents(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the latter of a path with a NUL in it
        raise InputError(f"{path}: {getattr(error, 'strerror', error)}") from None


def read_jsonl(path: str | Path) -> list[dict]:
    """One JSON object a line. Raises InputError("path:line: reason"), also for a blank line."""
    lines = io.BytesIO(_contents(path))  # bytes: a text would also be broken at a lone carriage return
    return [_read_object(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def numbered(path: str | Path) -> list[tuple[str, dict]]:
    """("path:line", object) of each line of a JSONL file; one without lines is an InputError too."""
    lines = [(f"{path}:{number}", line) for number, line in enumerate(read_jsonl(path), start=1)]
    if not lines:
        raise InputError(f"{path}: no lines in it")
    return lines


def check_fields(record: dict, kinds: dict[str, tuple[type | None, ...]], where: str) -> None:
    """InputError("where: field ...") for a field that is of none of its kinds: types of KINDS (a whole number is a number),
    or None where it may be null or missing."""
    for name, allowed in kinds.items():
        found = record.get(name)
        if not (type(found) in allowed or found is None and None in allowed or type(found) is int and float in allowed):
            raise InputError(f"{where}: field {name!r} must be {' or '.join(KINDS[kind] for kind in allowed if kind)}")


def _read_object(data: bytes, where: str) -> dict:
    try:
        return strictjson.loads(data)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def whole_lines(path: Path) -> list[dict]:
    """As `read_jsonl`, without a last line that lacks its newline: a process was killed while appending it."""
    lines = _contents(path).split(b"\n")[:-1]
    return [_read_object(line + b"\n", f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write all rows or, if anything fails, nothing: the old file stays until the new one is whole.

    Makes the folders on the way. NaN and infinity, which JSON lacks, become null; UTF-8, not ASCII escapes.
    """
    write_whole(path, jsonl(rows))


def jsonl(rows: Iterable[dict]) -> str:
    return "".join(map(json_line, rows))


def write_whole(path: str | Path, content: str | bytes) -> None:
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file that can be replaced")
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # a full disk's error does not name the file
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: not written ({error.strerror})") from None


def json_line(row: dict) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """`value` in JSON's own types: null for NaN and infinity, text for a path, numbers for 0-d tensors."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
