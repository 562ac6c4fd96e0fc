"""What a codec saves, and what that costs in accuracy: bytes and samples until a model is good, and how good it gets.

    update x      bytes of an fp32 update / bytes of an update, all parts of the message counted
    to target     samples, and megabytes of all workers up and down, until a look at the center finds 98.5 % (`mnist`)
    fewer x       bytes a sample of synchronous data-parallel training / bytes a sample, both ways together
    against fp32  test accuracy less that of the same rule with fp32 both ways, in points, mean over the seeds

`mnist`: rule x codec, each codec up, and down as a whole or a difference. `charlm`: DiLoCo, 100 local steps between
updates of 4 bits. Four workers, whose steps take 100 ms of virtual time with 10 % jitter; in every case of a task
equally many steps, the task's own learning rate and the rule's own settings, whatever the codec.

Synchronous is what `local_sgd` with one local step does, on batches of the same size: each worker sends all of its fp32
gradient (times the learning rate) every step, and receives the mean. Counted are updates and replies; joining is not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import typer
from matplotlib.figure import Figure

from benchmarks import harness, simulated
from benchmarks.harness import Benchmark
from benchmarks.simulated import Done, Run
from common import chunks
from common.binding import layout_of
from common.errors import ConfigError
from common.layout import Layout
from worker import tasks as worker_tasks
from worker.tasks import Context

WORKERS = 4
LOSSLESS = "fp32"
CODECS = (LOSSLESS, "bf16", "int8", "int4", "int4:1024", "e3m0", "e3m0:1024", "sign", "topk", "topk:0.0075")
"""The last sends an update of `mnist` in a hundredth of its bytes, parts included that no codec quantises."""
RULES = {"downpour": 4, "gem": 4, "local_sgd": 4}
"""Local steps of each on `mnist`."""
DIFFERENCES = ("--replies", "difference")


class Training(NamedTuple):
    """How long a task is trained, and how often it is looked at."""

    steps: int
    """Of each worker."""
    looks: int
    target: float | None
    """Accuracy, 0 to 1, to which samples and bytes are counted."""


TRAININGS = {"mnist": Training(3600, 45, 0.985), "charlm": Training(2000, 10, None)}


@dataclass(frozen=True)
class Case:
    """One row. words: what else the command is told."""

    task: str
    rule: str
    local_steps: int
    codec: str = LOSSLESS
    reply_codec: str = LOSSLESS
    words: tuple[str, ...] = ()

    @property
    def down(self) -> str:
        """Replies, in words."""
        return " ".join((self.reply_codec, *(word for word in self.words if not word.startswith("--"))))

    @property
    def lossless(self) -> bool:
        return self.codec == self.reply_codec == LOSSLESS


def synchronous(task: str) -> Case:
    """Data-parallel training on all workers' batches together."""
    return Case(task, "local_sgd", 1)


CASES: dict[str, tuple[Case, ...]] = {
    "mnist": (
        synchronous("mnist"),
        *(Case("mnist", rule, steps, codec) for rule, steps in RULES.items() for codec in CODECS),
        *(Case("mnist", rule, steps, "int8", "int8") for rule, steps in RULES.items()),
        *(
            Case("mnist", rule, steps, codec, "plain:int4", DIFFERENCES)
            for rule, steps in RULES.items()
            for codec in (LOSSLESS, "int4")
        ),
    ),
    "charlm": (
        synchronous("charlm"),
        Case("charlm", "diloco", 100),
        *(Case("charlm", "diloco", 100, codec, "int8") for codec in ("int8", "int4", "e3m0")),
        Case("charlm", "diloco", 100, "int4", "plain:int4", DIFFERENCES),
    ),
}

Data = Annotated[Path | None, typer.Option("--data", help="Folder of data sets, which `mnist` needs.")]
Tasks = Annotated[list[str], typer.Option("--task", help="mnist, charlm; repeat for more.")]
Rules = Annotated[list[str] | None, typer.Option("--rule", help="Only these rules; repeat for more.")]
Codecs = Annotated[list[str] | None, typer.Option("--codec", help="Only these codecs up; repeat for more.")]


def run(
    data: Data = None,
    tasks: Tasks = [*CASES],  # noqa: B006  # typer's way
    only_rules: Rules = None,
    only_codecs: Codecs = None,
    seeds: simulated.Seeds = 3,
    processes: simulated.Processes = 1,
    keep: simulated.Keep = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Simulate, print, write."""
    _expect("task", tasks, CASES)
    cases = [case for task in tasks for case in CASES[task]]
    _expect("rule", only_rules, {case.rule: None for case in cases})
    _expect("codec", only_codecs, {case.codec: None for case in cases})
    chosen = [case for case in cases if case == synchronous(case.task) or _is_wanted(case, only_rules, only_codecs)]
    runs = [simulation(case, TRAININGS[case.task], seed, data) for seed in range(seeds) for case in chosen]
    layouts = {task: layout_of(worker_tasks.load(task).make(Context(data=_folder(task, data))).model) for task in tasks}
    found = rows(simulated.run_all(runs, processes=processes, keep=keep), layouts)
    settings = {"workers": WORKERS, "seeds": seeds, **{f"steps on {task}": TRAININGS[task].steps for task in tasks}}
    simulated.report(BENCHMARK.name, found, settings, picture(found), json_file)


def _expect(what: str, wanted: Iterable[str] | None, known: Collection[str]) -> None:
    """Raise ConfigError for a name that no case has."""
    if unknown := [name for name in wanted or () if name not in known]:
        raise ConfigError(f"There is no case with the {what} '{unknown[0]}'.", fix=f"Known: {', '.join(known)}.")


def _is_wanted(case: Case, only_rules: Sequence[str] | None, only_codecs: Sequence[str] | None) -> bool:
    """Chosen, or what the chosen are compared with."""
    return case.rule in (only_rules or [case.rule]) and (case.lossless or case.codec in (only_codecs or [case.codec]))


def simulation(case: Case, training: Training, seed: int, data: Path | None) -> Run:
    """One case with one seed."""
    words = ["--rule", case.rule, "--workers", str(WORKERS), "--task", case.task, "--seed", str(seed)]
    words += ["--local-steps", str(case.local_steps), "--codec", case.codec, "--reply-codec", case.reply_codec]
    words += ["--budget-updates", str(training.steps * WORKERS // case.local_steps)]
    words += ["--evaluations", str(training.looks), *case.words]
    folder = _folder(case.task, data)
    words += [] if folder is None else ["--data", str(folder)]
    about = {"case": case, "seed": seed, "target": training.target}
    return Run(f"{case.task}, {case.rule}, {case.codec} up, {case.down} down, seed {seed}", tuple(words), about)


def _folder(task: str, data: Path | None) -> Path | None:
    """Where the task finds its data; `charlm` brings a text of its own."""
    return None if task == "charlm" else data


class Traffic(NamedTuple):
    """What one case exchanges."""

    update_bytes: int
    reply_bytes: int
    samples: float
    """Trained for one update."""

    @property
    def bytes_a_sample(self) -> float:
        return (self.update_bytes + self.reply_bytes) / self.samples


def traffic(one: Done, layout: Layout) -> Traffic:
    """Of a run; under the rules here one update is as long as another."""
    case: Case = one.run.about["case"]
    up, down = (chunks.plan(layout, codec).bytes for codec in (case.codec, case.reply_codec))
    return Traffic(up, down, one.report["samples"] / max(one.report["updates"], 1))


def rows(done: Sequence[Done], layouts: Mapping[str, Layout]) -> list[dict[str, Any]]:
    """One for each case, over its seeds. layouts: of each task's model."""
    by_case: dict[Case, list[Done]] = {}
    for one in done:
        by_case.setdefault(one.run.about["case"], []).append(one)
    return [_row(case, by_case, layouts[case.task]) for case in by_case]


def _row(case: Case, by_case: Mapping[Case, Sequence[Done]], layout: Layout) -> dict[str, Any]:
    runs = by_case[case]
    own, reference = (traffic(by_case[each][0], layout) for each in (case, synchronous(case.task)))
    exact = next(many for other, many in by_case.items() if _is_exact_twin(other, case))
    reached = [updates_to(one) for one in runs]
    updates = None if None in reached else mean(number for number in reached if number is not None)
    return {
        "task": case.task,
        "rule": case.rule,
        "H": case.local_steps,
        "up": case.codec,
        "down": case.down,
        "update x": round(reference.update_bytes / own.update_bytes, 1),
        "reply x": round(reference.reply_bytes / own.reply_bytes, 1),
        "test accuracy %": [percent(one) for one in runs],
        "against fp32": round(mean(map(percent, runs)) - mean(map(percent, exact)), 2),
        "test loss": [round(one.report["center_loss"], 4) for one in runs],
        "samples to target": None if updates is None else round(updates * own.samples),
        "MB up to target": None if updates is None else round(updates * own.update_bytes / 1e6, 2),
        "MB down to target": None if updates is None else round(updates * own.reply_bytes / 1e6, 2),
        "bytes a sample": round(own.bytes_a_sample, 1),
        "fewer x": round(reference.bytes_a_sample / own.bytes_a_sample, 1),
        "ends": [(one.diverged and "diverged") or "trained" for one in runs],
    }


def _is_exact_twin(other: Case, case: Case) -> bool:
    """Whether `other` is the case with fp32 both ways."""
    return other.lossless and (other.task, other.rule, other.local_steps) == (case.task, case.rule, case.local_steps)


def updates_to(one: Done) -> float | None:
    """Applied updates at the first look that found the target accuracy; None where none did, or there is no target."""
    target = one.run.about["target"]
    points = (point for point in one.report["curve"] if target is not None and point["accuracy"] >= target)
    return next((point["updates"] for point in points), None)


def percent(one: Done) -> float:
    """Test accuracy at the end, with two digits."""
    return round(100 * (one.report["center_accuracy"] or 0.0), 2)


def picture(found: Sequence[dict[str, Any]]) -> Figure:
    """Of each task: test accuracy at the end, mean and range over the seeds, over the bytes of a sample."""
    tasks = list(dict.fromkeys(row["task"] for row in found))
    figure = Figure(figsize=(7 * len(tasks), 5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for rule, steps in dict.fromkeys((row["rule"], row["H"]) for row in found if row["task"] == task):
            chosen = [row for row in found if (row["task"], row["rule"], row["H"]) == (task, rule, steps)]
            x, seen = [row["bytes a sample"] for row in chosen], [row["test accuracy %"] for row in chosen]
            y = [mean(each) for each in seen]
            reach = (
                [y - min(each) for y, each in zip(y, seen, strict=True)],
                [max(each) - y for y, each in zip(y, seen, strict=True)],
            )
            axes.errorbar(x, y, reach, fmt="o", capsize=2, elinewidth=0.6, label=f"{rule}, H = {steps}")
            for row, at in zip(chosen, zip(x, y, strict=True), strict=True):
                axes.annotate(_ways(row), at, textcoords="offset points", xytext=(4, 3), fontsize=7)
        axes.set(xscale="log", xlabel="bytes a sample, up and down", ylabel="test accuracy, %", title=task)
        axes.legend(fontsize="small")
    return figure


def _ways(row: dict[str, Any]) -> str:
    """Up, and down where that is not fp32."""
    return str(row["up"]) if row["down"] == LOSSLESS else f"{row['up']}, {row['down']} down"


BENCHMARK = Benchmark("bytes_to_accuracy", "how few bytes train a model, and what does that cost in accuracy?", run)
