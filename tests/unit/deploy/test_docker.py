"""The image and the clusters made of it, as far as that is seen without an engine.

Laws
* The compose files, and each together with what the docs lay over it, hold only fields of the Compose Specification
  (`tests/golden/compose-schema.json`), and the Dockerfile only instructions that this reader understands.
* Every command in them is one of the real command line's, and the environment they make is accepted by the settings.
* The image runs as an ordinary user, keeps its state in a volume, and names no host to get anything from.
* Slow: the wheel that the Dockerfile builds runs the server, its health check and a worker, from the wheel alone.

Not seen here: that the base image exists, that pip finds all dependencies, networks, volumes, restarts, GPUs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from common import config
from common.config import ServerSettings, Settings, WorkerSettings
from common.query import status
from deploy import cli
from tests.processes import PATIENCE_S, until
from tests.test_docs import Command, blocks, commands, is_ours, problem, simple_commands

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "docker"
DOCUMENT = ROOT / "docs" / "docker.md"
IGNORED = ROOT / ".dockerignore"

INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "RUN", "USER", "VOLUME", "WORKDIR"}
NOT_OURS = {"OMP_NUM_THREADS"}
"""Variables of the containers that are no settings of this program."""
HOSTNAMES = ("0f3a9c1b2d4e", "9be2417d0c65")
"""Such as an engine gives."""


# --- reading the Dockerfile ---


Stage = list[tuple[str, str]]
"""Pairs of instruction and what it is told, lines joined."""


def stages(text: str) -> tuple[Stage, list[Stage]]:
    """What stands before the first FROM, and each stage from its FROM on."""
    before: Stage = []
    found: list[Stage] = []
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, told = line.split(maxsplit=1)
        assert instruction in INSTRUCTIONS, f"this reader does not know {instruction}"
        if instruction == "FROM":
            found.append([])
        (found[-1] if found else before).append((instruction, told))
    return before, found


def told(stage: Stage, instruction: str) -> list[str]:
    return [words for name, words in stage if name == instruction]


def dockerfile() -> tuple[Stage, list[Stage]]:
    return stages((FOLDER / "Dockerfile").read_text(encoding="utf-8"))


def context() -> list[str]:
    """The names at the root that the engine is sent."""
    patterns = [line for line in IGNORED.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*", "nothing is sent unless it is named"
    named = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert patterns[1 : 1 + len(named)] == [f"!{name}" for name in named], "what is left out is said last"
    assert patterns[1 + len(named) :] == ["**/__pycache__", "**/*.py[cod]"]
    return named


# --- reading the compose files ---


def compose_files() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"))


def compose(*names: str) -> Any:
    """The files, each laid over those before it."""
    found: Any = {}
    for name in names:
        found = merged(found, yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")))
    return found


def merged(below: Any, above: Any) -> Any:
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        both = {name: merged(below[name], above[name]) for name in below.keys() & above.keys()}
        return {**below, **above, **both}
    return above


def filled_in(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`$$`, `${NAME}` and `${NAME:-default}` as Compose replaces them."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else (environ or {}).get(match["name"]) or match["default"] or ""

    replaced = re.sub(r"\$(\$|\{(?P<name>\w+)(:-(?P<default>[^}]*))?\})", value, text)
    assert "$" not in re.sub(r"\$\$|\$\{\w+(:-[^}]*)?\}", "", text), f"a $ that Compose would take for its own: {text}"
    return replaced


def environment(service: Any) -> dict[str, str]:
    """What the container is given where the user's shell sets nothing."""
    return {name: filled_in(str(value)) for name, value in service["environment"].items() if value is not None}


def outside() -> dict[str, str]:
    """This process's environment without settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(config.PREFIX)}


def program(service: Any) -> Command:
    """The one command of ours that a service runs, whether by the image's entry point or by a shell."""
    words = [filled_in(word) for word in service["command"]]
    if "entrypoint" not in service:
        return Command("compose", ("paramserver", *words))
    assert service["entrypoint"] == ["sh", "-c"]
    (line,) = words
    (simple,) = simple_commands("compose", line)
    return Command("compose", simple)


def settings_shown(*words: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """What the command makes of words and environment: each setting's value."""
    found = CliRunner().invoke(cli.app, [*words, "--print-config", "--json"], env=dict(environ))
    assert found.exit_code == 0, found.output
    return {row["name"]: row["value"] for row in json.loads(found.stdout)}


def as_started(folder: Path, service: Any, hostname: str, stand_in: str, **environ: str) -> subprocess.Popen[bytes]:
    """The worker's own shell line, where `paramserver` and `hostname` are those of the container."""
    for name, script in (("paramserver", stand_in), ("hostname", f"echo {hostname}")):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    (line,) = (filled_in(word) for word in service["command"])
    return subprocess.Popen(
        [*service["entrypoint"], line],
        env={**outside(), **environment(service), **environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        cwd=folder,
    )


# --- the image ---


def test_the_image_is_made_of_every_package_and_of_nothing_else() -> None:
    sent = context()
    assert all((ROOT / name).exists() for name in sent)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert {name for name in sent if (ROOT / name).is_dir()} == packages
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= set(sent)


def test_no_host_is_named_and_no_version_but_in_constraints() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"==\s*\d", text)


def test_stages_come_from_one_base_and_only_the_last_is_kept() -> None:
    before, (build, image) = dockerfile()
    assert told(before, "ARG") == ["BASE=python:3.11-slim"]
    assert told(build, "FROM") == ["${BASE} AS wheel"]
    assert told(image, "FROM") == ["${BASE}"]
    assert all(words.startswith("--from=wheel /source/") for words in told(image, "COPY")), "the code stays behind"


def test_every_install_passes_pip_args_on() -> None:
    for stage in dockerfile()[1]:
        names = {word.partition("=")[0] for words in told(stage, "ARG") for word in words.split()}
        for words in told(stage, "RUN"):
            if re.search(r"pip (wheel|install)", words) and "--no-deps --no-cache-dir" not in words:
                assert "$PIP_ARGS" in words
                assert "PIP_ARGS" in names, "an ARG holds for its stage"


def test_code_comes_after_what_changes_seldom() -> None:
    _, (_, image) = dockerfile()
    order = [words for name, words in image if name == "COPY"]
    assert [re.findall(r"[\w*]+\.\w+", words)[-1] for words in order] == ["torch.txt", "constraints.txt", "*.whl"]


def test_the_program_runs_as_an_ordinary_user_with_its_state_in_a_volume() -> None:
    _, (_, image) = dockerfile()
    user, _, group = told(image, "USER")[-1].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert image.index(("USER", f"{user}:{group}")) > max(n for n, (name, _) in enumerate(image) if name == "RUN")
    (volume,) = told(image, "VOLUME")
    made = next(words for words in told(image, "RUN") if "useradd" in words)
    assert f"--uid {user}" in made
    assert f" {volume}" in made, "a named volume takes over who owns the folder"
    words = program(compose("compose.yaml")["services"]["server"]).words
    assert words[words.index("--directory") + 1] == volume


def test_the_image_is_the_program() -> None:
    _, (_, image) = dockerfile()
    (entry,), (default,) = told(image, "ENTRYPOINT"), told(image, "CMD")
    assert problem(Command("Dockerfile", (*json.loads(entry), *json.loads(default)))) is None
    assert json.loads(entry) == ["paramserver"]


# --- the clusters ---


def schema() -> Any:
    return json.loads((ROOT / "tests" / "golden" / "compose-schema.json").read_text(encoding="utf-8"))


def faults(document: Any) -> list[str]:
    found = jsonschema.Draft202012Validator(schema()).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("path", compose_files(), ids=lambda path: path.name)
def test_compose_files_are_valid_alone_and_laid_over_the_base(path: Path) -> None:
    assert faults(compose(path.name)) == []
    both = compose("compose.yaml", path.name)
    assert faults(both) == []
    assert both["services"].keys() == compose("compose.yaml")["services"].keys(), "a service of another name"


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"services": {"a": {"comand": ["serve"]}}},
        {"services": {"a": {"healthcheck": {"test": ["paramserver", "status"]}}}},
        {"services": {"a": {"healthcheck": {"interval": 5}}}},
        {"services": {"a": {"depends_on": {"b": {"condition": "healthy"}}}}},
        {"services": {"a": {"restart": "on-error"}}},
        {"services": {"a": {"deploy": {"resources": {"reservations": {"devices": [{"driver": "nvidia"}]}}}}}},
        {"services": {"a": {"environment": {"A": ["b"]}}}},
        {"service": {}, "services": {}},
    ],
    ids=str,
)
def test_the_schema_finds_what_is_wrong(wrong: Any) -> None:
    assert faults(wrong)


def test_both_services_are_the_image_of_this_dockerfile() -> None:
    services = compose("compose.yaml")["services"]
    for service in services.values():
        build = service["build"]
        assert (FOLDER / build["context"]).resolve() == ROOT
        assert ROOT / build["dockerfile"] == FOLDER / "Dockerfile"
        declared = {
            word.partition("=")[0]
            for stage in dockerfile()[1]
            for words in told(stage, "ARG")
            for word in words.split()
        }
        assert build["args"].keys() <= declared
    assert len({service["image"] for service in services.values()}) == 1


def test_every_command_is_understood() -> None:
    services = compose("compose.yaml")["services"]
    check = services["server"]["healthcheck"]["test"]
    assert check[0] == "CMD", "no shell between"
    for command in (*map(program, services.values()), Command("health check", tuple(check[1:]))):
        assert is_ours(command)
        assert problem(command) is None


@pytest.mark.parametrize("name", [path.name for path in compose_files()])
def test_each_variable_is_a_setting_of_the_process_it_is_given_to(name: str) -> None:
    owners: dict[str, type[Settings]] = {"server": ServerSettings, "worker": WorkerSettings}
    for service, words in compose("compose.yaml", name)["services"].items():
        names = words["environment"].keys() - NOT_OURS
        assert {variable[: len(config.PREFIX)] for variable in names} == {config.PREFIX}
        assert {variable.removeprefix(config.PREFIX).lower() for variable in names} <= owners[
            service
        ].model_fields.keys()


def test_a_variable_of_the_shell_reaches_the_setting_of_its_name() -> None:
    for words in compose("compose.yaml")["services"].values():
        for variable, value in words["environment"].items():
            if value is not None and "$" in value:
                assert filled_in(value, {variable: "this"}) == "this"


def test_the_server_listens_to_the_other_containers_and_saves() -> None:
    server = compose("compose.yaml")["services"]["server"]
    shown = settings_shown(*program(server).words[1:], environ=environment(server))
    assert shown["bind"] == ["tcp://0.0.0.0:5555"]
    assert shown["insecure"] is True
    assert shown["directory"] == "/state"
    assert shown["rule"] == "gem"
    assert shown["budget_updates"] == 1200
    assert "ports" not in server, "what is not encrypted is not published"
    grace_s = int(server["stop_grace_period"].removesuffix("s"))
    assert grace_s > 2 * ServerSettings().drain_s, "a last checkpoint is written after that"


def test_the_health_check_asks_where_the_server_listens_and_outlasts_the_question() -> None:
    server = compose("compose.yaml")["services"]["server"]
    words = program(server).words
    port = words[words.index("--bind") + 1].rpartition(":")[2]
    check = server["healthcheck"]
    assert f"tcp://127.0.0.1:{port}" in check["test"]
    assert int(check["timeout"].removesuffix("s")) > 5, "status itself gives up after 5 s"


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=" ".join)
def test_each_worker_bears_its_hosts_name_and_has_a_seed_of_its_own(files: tuple[str, ...], tmp_path: Path) -> None:
    services = compose(*files)["services"]
    seeds = set()
    for hostname in HOSTNAMES:
        process = as_started(tmp_path, services["worker"], hostname, 'printf "%s\\n" "$@"')
        words = process.communicate(timeout=PATIENCE_S)[0].decode().splitlines()
        assert process.returncode == 0
        shown = settings_shown(*words, environ=environment(services["worker"]))
        assert shown["name"] == hostname
        assert shown["address"] == "tcp://server:5555"
        assert shown["task"] == "digits"
        assert shown["device"] == ("cuda" if "compose.gpu.yaml" in files else "cpu")
        seeds.add(shown["seed"])
    assert len(seeds) == len(HOSTNAMES), "two workers with one seed would see the same batches"


def test_workers_wait_until_the_server_answers() -> None:
    services = compose("compose.yaml")["services"]
    assert services["worker"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    host = environment(services["worker"])["PARAMSERVER_ADDRESS"]
    assert host.removeprefix("tcp://").partition(":")[0] in services


# --- the document ---


def engine_lines() -> Iterator[Command]:
    for command in commands("docs/docker.md", DOCUMENT.read_text(encoding="utf-8")):
        if command.words[0] == "docker":
            yield command


def inside(command: Command) -> Command | None:
    """The command of ours that a line of the engine runs in a container, if it is one."""
    words = list(command.words)
    if "exec" in words:
        return Command(command.place, tuple(words[words.index("exec") + 2 :]))
    if words[1] == "run":
        image = next(n for n, word in enumerate(words[2:], start=2) if not word.startswith("-"))
        return Command(command.place, ("paramserver", *words[image + 1 :]))
    return None


def test_commands_run_in_containers_are_understood() -> None:
    found = [ours for command in engine_lines() if (ours := inside(command)) is not None]
    assert found
    for command in found:
        assert is_ours(command)
        assert problem(command) is None, command


def test_the_document_speaks_of_services_and_files_that_exist() -> None:
    for command in engine_lines():
        words = shlex.join(command.words)
        services = re.findall(r"--scale (\w+)=|exec (\w+)|cp (\w+):|run .*--no-deps (\w+)", words)
        assert {name for match in services for name in match if name} <= compose("compose.yaml")["services"].keys()
        assert all((FOLDER / name).is_file() for name in re.findall(r"--file (\S+)", words))


def test_what_the_document_lays_over_the_cluster_is_valid() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = [yaml.safe_load("\n".join(lines)) for _, kind, lines in blocks("docker.md", text) if kind == "yaml"]
    assert found
    for document in found:
        assert faults(document) == []
        assert faults(merged(compose("compose.yaml"), document)) == []


# --- the readers themselves ---


def test_lines_and_stages_are_read() -> None:
    text = "# a\nARG A=1\nFROM $A AS x\nRUN one \\\n    # why\n    && two\nFROM $A\nCMD []\n"
    assert stages(text) == (
        [("ARG", "A=1")],
        [[("FROM", "$A AS x"), ("RUN", "one && two")], [("FROM", "$A"), ("CMD", "[]")]],
    )
    with pytest.raises(AssertionError, match="HEALTHCHECK"):
        stages("FROM a\nHEALTHCHECK NONE\n")


def test_values_are_filled_in() -> None:
    assert filled_in('"$$(hostname)" ${A:-b} ${A}', {}) == '"$(hostname)" b '
    assert filled_in("${A:-b}${C:-}", {"A": "c"}) == "c"
    with pytest.raises(AssertionError):
        filled_in("$(hostname)")


def test_later_files_lie_over_earlier_ones() -> None:
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2], "d": 3}}) == {"a": {"b": 1, "c": [2], "d": 3}}


# --- the wheel, built and run ---


def offline() -> list[str]:
    """For pip: build with the setuptools that is here, where it is new enough."""
    try:
        return ["--no-build-isolation"] if int(metadata.version("setuptools").partition(".")[0]) >= 77 else []
    except metadata.PackageNotFoundError:
        return []


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and nothing else, built by the lines of the Dockerfile from the files it is sent."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in context():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]"))
        else:
            shutil.copy(ROOT / name, source / name)
    _, (build, _) = dockerfile()
    bin_folder = tmp_path_factory.mktemp("bin")
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    (bin_folder / "python").chmod(0o755)
    environ = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PIP_ARGS": shlex.join(["-q", *offline()])}
    for line in told(build, "RUN"):
        subprocess.run(["sh", "-c", line], cwd=source, env=environ, check=True, timeout=PATIENCE_S)
    (wheel,) = (source / "dist").glob("*.whl")
    requirements = (source / "dist" / "requirements.txt").read_text(encoding="utf-8").split()
    assert any(line.startswith("torch") for line in requirements)
    assert any(line.startswith("scikit-learn") for line in requirements)
    assert re.fullmatch(r"torch==[\d.]+\n", (source / "dist" / "torch.txt").read_text(encoding="utf-8"))
    words = ["install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=PATIENCE_S)
    return target


@pytest.mark.slow
def test_the_wheel_alone_serves_answers_its_health_check_and_trains(installed: Path, tmp_path: Path) -> None:
    services = compose("compose.yaml")["services"]
    environ = {**outside(), "PYTHONPATH": str(installed), "PARAMSERVER_BUDGET_UPDATES": "20", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        return subprocess.run(
            words, env=environ, cwd=tmp_path, check=True, timeout=PATIENCE_S, stdout=subprocess.PIPE
        ).stdout.decode()

    assert run(sys.executable, "-c", "import deploy; print(deploy.__file__)").startswith(str(installed))
    executable = str(installed / "bin" / "paramserver")
    assert "serve" in run(executable, "--help")

    # The server as the container starts it, but on a free port of the loopback, and in a folder of this test.
    ready, replaced = tmp_path / "ready", {"tcp://0.0.0.0:5555": "tcp://127.0.0.1:0", "/state": str(tmp_path / "state")}
    words = [replaced.get(word, word) for word in program(services["server"]).words[1:]]
    server_environ = {**environment(services["server"]), **environ}
    with subprocess.Popen(
        [executable, *words, "--ready-file", str(ready)], env=server_environ, cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as server:
        try:
            until(lambda: ready.exists() or server.poll() is not None, "the server")
            address = ready.read_text(encoding="utf-8").strip()
            check = services["server"]["healthcheck"]["test"][2:]
            found = json.loads(run(executable, *(address if word.startswith("tcp://") else word for word in check)))
            assert found["rule"] == "gem"
            worker = as_started(
                tmp_path,
                services["worker"],
                HOSTNAMES[0],
                f'exec {shlex.quote(executable)} "$@"',
                PYTHONPATH=str(installed),
                PARAMSERVER_ADDRESS=address,
            )
            try:
                assert worker.wait(PATIENCE_S) == 0
            finally:
                worker.kill()
                worker.communicate()
            found = status(address, timeout_s=20.0)
            assert found["updates"] == 20
            assert [row["name"] for row in found["workers"]] == [HOSTNAMES[0]]
            server.terminate()
            assert server.wait(PATIENCE_S) == 0
        finally:
            server.kill()
    assert (tmp_path / "state" / "run.jsonl").is_file()
