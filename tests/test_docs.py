"""Every command in the docs is valid: it would be understood, though here it is not run.

Read are the fenced `console`, `bash` and `sh` blocks of README.md, CONTRIBUTING.md and docs/*.md. In a `console` block
with a prompt (`$ `) the other lines are output. Each command that starts with `paramserver`, `make` or
`python -m benchmarks` is checked:
* `paramserver` is parsed by the real command line, so that the subcommand, each flag, each choice and the required
  arguments are proved; only that a file exists is not asked, for it is the reader's file;
* `make` names targets that the Makefile has;
* `python -m benchmarks NAME` names a module of benchmarks/.
A block that cannot be read is an error, never skipped.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {"console", "shell-session", "bash", "sh", "shell"}
OPERATORS = {";", "&", "&&", "||", "|", "|&", "(", ")", ";;"}
REDIRECTIONS = {"<", ">", ">>", ">&", "&>", "<<<"}
LEADING_WORDS = {"do", "then", "else", "if", "while", "until", "!", "{", "time", "exec", "nohup", "sudo"}
MAKE_FLAGS = re.compile(r"-(j\d*|[Bkns]+)")


class UnreadableError(Exception):
    """A block or a line that this reader does not understand."""


@dataclass(frozen=True, slots=True)
class Command:
    """One simple command and where it stands."""

    place: str
    words: tuple[str, ...]


# --- from a document to commands ---


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(name: str, text: str) -> Iterator[Command]:
    """All simple commands of all shell blocks; raises UnreadableError."""
    for first_line, language, lines in blocks(name, text):
        if language in LANGUAGES:
            for number, line in typed_lines(first_line, lines):
                place = f"{name}:{number}"
                yield from (Command(place, words) for words in simple_commands(place, line))


def blocks(name: str, text: str) -> Iterator[tuple[int, str, list[str]]]:
    """(number of its first line, language, lines) of each fenced block."""
    fence, language, start, lines = "", "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        if fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                yield start, language, lines
                fence = ""
            else:
                lines.append(line)
        elif opening := re.match(r"(`{3,}|~{3,})\s*([\w-]*)", bare):
            fence, language, start, lines = opening[1], opening[2].lower(), number + 1, []
    if fence:
        raise UnreadableError(f"{name}:{start - 1}: a block that is never closed")


def typed_lines(first_line: int, lines: list[str]) -> Iterator[tuple[int, str]]:
    """What a reader would type: prompts removed, continued lines joined, output left out."""
    prompted = any(line.lstrip().startswith("$ ") for line in lines)
    whole, start, continues = "", 0, False
    for number, line in enumerate(lines, start=first_line):
        bare = line.strip()
        if continues:
            whole += " " + bare.removeprefix("> ")
        elif prompted and not bare.startswith("$ "):
            continue
        else:
            whole, start = bare.removeprefix("$ "), number
        continues = whole.endswith("\\")
        whole = whole.removesuffix("\\")
        if not continues:
            yield start, whole
    if continues:
        yield start, whole


def simple_commands(place: str, line: str) -> Iterator[tuple[str, ...]]:
    """The commands of one line, cut at `;`, `&&`, `|` ..., without redirections, assignments and leading words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise UnreadableError(f"{place}: {error}: {line}") from error
    words: list[str] = []
    skip = False
    for token in [*tokens, ";"]:
        if skip:
            skip = False
        elif token in REDIRECTIONS:
            if words and words[-1].isdigit():  # the 2 of `2> file`
                words.pop()
            skip = True
        elif token in OPERATORS:
            if simple := without_leading_words(words):
                yield simple
            words = []
        elif not set(token) - set("();<>|&"):
            raise UnreadableError(f"{place}: what is {token}? {line}")
        else:
            words.append(token)


def without_leading_words(words: list[str]) -> tuple[str, ...]:
    for position, word in enumerate(words):
        if word not in LEADING_WORDS and not re.match(r"[A-Za-z_]\w*=", word):
            return tuple(words[position:])
    return ()


# --- is it valid? ---


def problem(command: Command) -> str | None:
    """Why the command is not valid, None when it is; a command of another program is not ours to judge."""
    program, *arguments = command.words
    program = program.rpartition("/")[2]
    if program == "paramserver":
        return problem_of_paramserver(arguments)
    if program == "make":
        return problem_of_make(arguments, targets((ROOT / "Makefile").read_text(encoding="utf-8")))
    if re.fullmatch(r"python[\d.]*", program) and arguments[:2] == ["-m", "benchmarks"]:
        return problem_of_benchmarks(arguments[2:], ROOT / "benchmarks")
    return None


def is_ours(command: Command) -> bool:
    program, *arguments = command.words
    name = program.rpartition("/")[2]
    return name in {"paramserver", "make"} or (name.startswith("python") and arguments[:2] == ["-m", "benchmarks"])


def problem_of_paramserver(arguments: list[str]) -> str | None:
    from deploy.cli import app

    return problem_of_typer(app, arguments)


def problem_of_typer(app: typer.Typer, arguments: list[str]) -> str | None:
    """Parse, as the program itself would, and stop before anything is run."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parse(typer.main.get_command(app), "paramserver", arguments, parent=None)
    except typer.Exit as done:  # --help, --version
        return f"exits with {done.exit_code}" if done.exit_code else None
    except Exception as error:
        sentence = error.format_message() if hasattr(error, "format_message") else str(error)
        return f"{type(error).__name__}: {sentence}"
    return None


def parse(command: Any, name: str, arguments: list[str], *, parent: Any) -> None:
    with any_path_exists(command):
        context = command.make_context(name, list(arguments), parent=parent)
    with context:
        if hasattr(command, "resolve_command"):  # a group
            # Which list holds the subcommand's words depends on the version of the parser.
            rest = [*getattr(context, "_protected_args", ()), *context.args]
            if rest:
                name, subcommand, rest = command.resolve_command(context, rest)
                parse(subcommand, name, rest, parent=context)
            elif not command.invoke_without_command:
                raise UnreadableError(f"{name} needs a subcommand")


@contextlib.contextmanager
def any_path_exists(command: Any) -> Iterator[None]:
    """A path in the docs is of the reader's machine, not of ours."""
    with contextlib.ExitStack() as stack:
        for parameter in command.params:
            # Which object holds `exists=True` depends on the version of typer.
            descriptor = getattr(parameter, "type_descriptor", None)
            for holder in (getattr(descriptor, "parameter_info", None), getattr(parameter, "type", None)):
                if getattr(holder, "exists", False):
                    stack.enter_context(patch.object(holder, "exists", False))
        yield


def problem_of_make(arguments: list[str], known: set[str]) -> str | None:
    for word in arguments:
        if word.startswith("-"):
            if not MAKE_FLAGS.fullmatch(word):
                return f"this test does not know the flag {word} of make"
        elif "=" not in word and word not in known:
            return f"the Makefile has no target {word}; it has {', '.join(sorted(known))}"
    return None


def targets(makefile: str) -> set[str]:
    lines = re.findall(r"^([A-Za-z][\w .-]*):(?!=)", makefile, flags=re.MULTILINE)
    return {target for line in lines for target in line.split()}


def problem_of_benchmarks(arguments: list[str], folder: Path) -> str | None:
    names = [word for word in arguments[:1] if not word.startswith("-")]
    known = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if names and names[0] not in known:
        return f"there is no benchmark {names[0]}; there are {', '.join(known)}"
    return None


# --- the docs as they are ---


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_valid(document: Path) -> None:
    name = str(document.relative_to(ROOT))
    found = list(commands(name, document.read_text(encoding="utf-8")))
    problems = [
        f"{command.place}: {shlex.join(command.words)}\n    {why}" for command in found if (why := problem(command))
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_the_readme_shows_how_to_start() -> None:
    readme = ROOT / "README.md"
    found = [command.words for command in commands("README.md", readme.read_text(encoding="utf-8")) if is_ours(command)]
    assert ("make", "demo") in found
    assert ("make", "test") in found


# --- the reader and the checks themselves ---


def words(text: str) -> list[tuple[str, ...]]:
    return [command.words for command in commands("x.md", text)]


def test_a_prompt_tells_commands_from_output() -> None:
    text = "```console\n$ make demo\nmake: nothing to do\n$ paramserver status \\\n>   --json  # why\n```\n"
    assert words(text) == [("make", "demo"), ("paramserver", "status", "--json")]


def test_without_a_prompt_every_line_is_a_command() -> None:
    assert words("```sh\nmake demo\nmake test\n```") == words("```console\nmake demo\nmake test\n```")


def test_only_shell_blocks_are_read() -> None:
    other = "```python\nmake = 1\n```\n\nmake nothing\n"
    shell = "~~~bash\nmake test\n~~~\n1. x\n   ```bash title='x'\n   make demo\n   ```"
    assert words(f"{other}\n{shell}") == [("make", "test"), ("make", "demo")]


def test_a_line_is_cut_into_its_commands() -> None:
    line = "A=1 make demo > log 2>&1 && for i in 1 2; do paramserver worker tcp://h:1 & done | tee 'a b'"
    assert words(f"```bash\n{line}\n```") == [
        ("make", "demo"),
        ("for", "i", "in", "1", "2"),
        ("paramserver", "worker", "tcp://h:1"),
        ("done",),
        ("tee", "a b"),
    ]


@pytest.mark.parametrize("text", ["```bash\nmake demo\n", "```bash\nmake 'demo\n```", "```bash\nmake <<EOF\n```"])
def test_what_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(UnreadableError):
        words(text)


def program() -> typer.Typer:
    app, checkpoint = typer.Typer(), typer.Typer()
    app.add_typer(checkpoint, name="checkpoint")

    @app.command()
    def serve(config: Path = typer.Option(None, exists=True), bind: str = "", http: int = 0) -> None:
        pytest.fail("a command was run")

    @app.command()
    def worker(address: str, verbose: bool = False) -> None:
        pytest.fail("a command was run")

    @checkpoint.command("list")
    def show(folder: Path) -> None:
        pytest.fail("a command was run")

    return app


@pytest.mark.parametrize(
    "line",
    [
        "serve",
        "serve --bind tcp://127.0.0.1:5555 --http 8080",
        "serve --config the_readers_own.toml",
        "worker tcp://h:1 --no-verbose",
        "checkpoint list runs/a",
        "--help",
        "checkpoint list --help",
    ],
)
def test_a_valid_line_is_accepted(line: str) -> None:
    assert problem_of_typer(program(), shlex.split(line)) is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "serv",
        "serve --bund x",
        "serve --http many",
        "serve --bind",
        "serve extra",
        "worker",
        "worker tcp://h:1 --verbose=maybe",
        "checkpoint",
        "checkpoint lst",
        "checkpoint list runs/a --json",
    ],
)
def test_an_invalid_line_is_found(line: str) -> None:
    assert problem_of_typer(program(), shlex.split(line))


def test_targets_and_benchmarks_are_looked_up(tmp_path: Path) -> None:
    known = targets("X := 1\nY?=2\n.PHONY: demo\ndemo test: .venv  ## x\n\techo a: b\n")
    assert known == {"demo", "test"}
    assert problem_of_make(["-j4", "demo", "X=2"], known) is None
    assert problem_of_make(["dmo"], known)
    assert problem_of_make(["--unheard-of"], known)
    (tmp_path / "roundtrip.py").touch()
    (tmp_path / "__main__.py").touch()
    assert problem_of_benchmarks(["roundtrip", "--json", "x"], tmp_path) is None
    assert problem_of_benchmarks([], tmp_path) is None
    assert problem_of_benchmarks(["roundtrp"], tmp_path)
    assert problem_of_benchmarks(["__main__"], tmp_path)


@pytest.mark.parametrize(
    "line",
    ["paramserver conjure --rule gem", ".venv/bin/paramserver conjure", "make conjure", "python -m benchmarks conjure"],
)
def test_a_wrong_command_of_each_kind_is_found_from_the_text(line: str) -> None:
    (command,) = commands("x.md", f"```console\n$ {line}\n```")
    assert is_ours(command)
    assert problem(command)
