"""Every setting of a server and of a worker: its name, unit, default, range and meaning, and where its value came from.

    defaults  <  TOML file  <  environment (PARAMSERVER_NAME)  <  command-line flags

Laws
* Settings are loaded once, at the edge, and frozen; nobody else reads the environment (here it is an argument).
* Each value knows its origin, and each refusal names the setting, the value, the origin, what is allowed and why.
* A name that is no setting is refused, in the file and in the environment alike, with the nearest one that is. So is
  a combination that cannot work.
* Adding a setting is adding a field: loading, refusing, explaining and listing read the fields.

A table such as `[rule_settings]` is merged key by key over the layers; any other setting is replaced whole. An empty
environment variable counts as not given, and so do those that Kubernetes makes for a service named like this program.
Left out: flags themselves (`deploy.options` makes them), and finding the file.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from common import codecs, discovery, rules
from common.codecs.base import Codec
from common.errors import ConfigError
from common.rules.base import Config, Rule, Terms

T = TypeVar("T")

PREFIX = "PARAMSERVER_"
"""Start of every environment variable that is a setting."""

_TCP = re.compile(r"tcp://(?P<host>\[[^\s\[\]]+\]|[^\s:/\[\]]+):(?P<port>\*|[0-9]{1,5})")
_IPC = re.compile(r"ipc://\S+")


def _no(sentence: str, fix: str) -> ValueError:
    """A ConfigError in the form in which pydantic carries it to `_refusal`, which adds where the value came from."""
    return ValueError(ConfigError(sentence, fix=fix))


def _carry(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result; its ConfigError travels like `_no`."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise ValueError(error) from error


def _address(address: str) -> str:
    tcp = _TCP.fullmatch(address)
    if (tcp and (tcp["port"] == "*" or int(tcp["port"]) <= 65_535)) or _IPC.fullmatch(address):
        return address
    raise _no(
        f"'{address}' is not an address.",
        fix="An address is tcp://HOST:PORT with a port up to 65535, or ipc://PATH on one machine.",
    )


def _terms(values: Mapping[str, Any]) -> Terms:
    """What a rule may depend on, of a server's settings by name."""
    lossless = all(codecs.load(one).lossless for one in (*codecs.choices(values["codec"]), values["reply_codec"]))
    return Terms(values["local_steps"], values["overlap"], values["workers"], lossless, values["max_clock_gap"])


def _is_public(address: str) -> bool:
    """Whether another machine may reach it. An interface given by name counts as public."""
    tcp = _TCP.fullmatch(address)
    if tcp is None or tcp["host"] == "localhost":
        return False
    try:
        return not ipaddress.ip_address(tcp["host"].strip("[]")).is_loopback
    except ValueError:
        return True


Address = Annotated[str, AfterValidator(_address)]
RuleName = Annotated[str, AfterValidator(lambda name: _carry(rules.load, name).name)]
CodecName = Annotated[str, AfterValidator(lambda name: _carry(codecs.load, name).name)]
UpdateCodecName = Annotated[str, AfterValidator(lambda name: _carry(codecs.setting, name))]


def _for_replies(name: str, info: ValidationInfo) -> str:
    codec = codecs.load(name)
    if info.data.get("replies") == "difference":
        return _for_differences(codec)
    if not codec.carries_parameters:
        fit = [one for one in codecs.names() if codecs.load(one).carries_parameters]
        raise _no(
            f"Codec '{name}' cannot carry replies, which are the center itself, each complete in itself.",
            fix=f"Those that can: {', '.join(fit)}; others where replies are differences (--replies difference).",
        )
    return name


def _for_differences(codec: Codec) -> str:
    """Its name, where what is encoded is the difference to a replica, which holds all that was lost."""
    bare = codec.name.removeprefix("ef:")
    if codec.lossless:
        raise _no(
            f"A difference in '{codec.name}' is as long as the center itself, which is exact.",
            fix="Name a codec that is shorter, such as --reply-codec int8, or leave replies whole.",
        )
    if codec.remembers:
        plain = codecs.load(bare if codec.feedback == "optional" else f"plain:{bare}")
        raise _no(
            f"A reply is the difference to what its worker holds, and holds all that was lost: with the feedback of "
            f"codec '{codec.name}' it would be counted twice.",
            fix=f"Use {plain.name if plain.contraction else 'another codec'}.",
        )
    if codec.contraction is None:
        raise _no(
            f"A reply is the difference to what its worker holds, which codec '{codec.name}' may enlarge.",
            fix="Use a codec with smaller groups or more levels, or another one.",
        )
    return codec.name


ReplyCodecName = Annotated[CodecName, AfterValidator(_for_replies)]


def _codec_refusal(rule: Rule, codec: Codec) -> ConfigError | None:
    """Why updates of this rule do not travel in this codec."""
    bare = codec.name.removeprefix("ef:")
    if rule.schedules and not codec.carries_parameters:
        return ConfigError(
            f"Rule '{rule.name}' uploads parameters as they are, which codec '{codec.name}' cannot carry.",
            fix="Use fp32, fp16, bf16 or int8.",
        )
    if rule.track is not None and codec.remembers:
        plain = codecs.load(bare if codec.feedback == "optional" else f"plain:{bare}")
        return ConfigError(
            f"Rule '{rule.name}' pushes the difference to what the server knows of a worker, which holds all that was "
            f"lost: with the feedback of codec '{codec.name}' it would be counted twice.",
            fix=f"Use {plain.name if plain.contraction else 'another codec'}.",
        )
    if rule.track is not None and codec.contraction is None:
        return ConfigError(
            f"Rule '{rule.name}' pushes the difference to what the server knows of a worker, which codec "
            f"'{codec.name}' may enlarge.",
            fix="Use a codec with smaller groups or more levels, or another one.",
        )
    if rule.track is None and codec.feedback == "always" and not codec.remembers:
        return ConfigError(
            f"Codec '{codec.name}' loses most of an update, and under rule '{rule.name}' nothing brings it back.",
            fix=f"Use {codec.name.removeprefix('plain:')}, which feeds back what is lost.",
        )
    return None


class Settings(BaseModel):
    """Frozen settings; however they are made, a value that is not allowed raises ConfigError, in our words."""

    owner: ClassVar[str] = "nobody"
    """Whose settings they are, in words."""
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def tables(self) -> Mapping[str, BaseModel]:
        """The settings that are tables, each as the model that defines its keys."""
        return {}

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("truth", "true and false belong to settings that are on or off")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            raise _refusal(cls, error.errors()[0], info.context or {}) from None


class ServerSettings(Settings):
    """All that a server is told. Workers adopt rule, codecs, local steps and overlap from it when they join."""

    owner = "the server"

    # where it listens
    insecure: bool = Field(default=False, description="serve other machines without encryption, on a network you trust")
    bind: tuple[Address, ...] = Field(
        default=("tcp://127.0.0.1:5555",), min_length=1, description="addresses to listen on"
    )
    shared_memory: bool = Field(
        default=True, description="workers on this machine read and write tensors in memory they share with the server"
    )
    # what it computes
    rule: RuleName = Field(default="downpour", description="update rule; `paramserver rules` lists them")
    rule_settings: dict[str, bool | int | float | str] = Field(default={}, description="settings of the rule")
    codec: UpdateCodecName = Field(
        default="fp32", description="encoding of updates, worker to server; auto: whichever is fastest, for each worker"
    )
    replies: Literal["whole", "difference"] = Field(
        default="whole", description="to pushes: the center itself, or what it differs by from what the worker holds"
    )
    reply_codec: ReplyCodecName = Field(default="fp32", description="encoding of replies, server to worker")
    local_steps: int = Field(default=1, ge=1, le=1_000_000, description="optimizer steps a worker takes between pushes")
    local_steps_by: Literal["fixed", "speed", "diversity"] = Field(
        default="fixed",
        description="all of them; fewer for slower workers; as many as the gradients' diversity carries",
    )
    overlap: bool = Field(default=False, description="workers train on while an exchange is under way")
    workers: int | None = Field(default=None, ge=1, le=65_536, description="workers that are expected")
    lag_weight: Literal["none", "inverse", "polynomial"] = Field(
        default="none", description="scale of an update by its lag: 1, 1 / (lag + 1), or (1 + lag)^-lag_exponent"
    )
    lag_exponent: float = Field(default=0.5, ge=0, le=10, description="exponent of the polynomial lag weight")
    max_lag: int | None = Field(default=None, ge=0, le=2**40, description="largest lag of an update, versions")
    beyond_max_lag: Literal["reject", "weight"] = Field(
        default="reject",
        description="an update with a larger lag is rejected, or weighted by (max_lag + 1) / (lag + 1)",
    )
    max_clock_gap: int | None = Field(
        default=None, ge=0, le=2**40, description="pushes that a worker may be ahead of the slowest before it waits"
    )
    buffers: Literal["auto", "average", "leader", "local"] = Field(
        default="auto", description="running means and the like: averaged, the last pushed, left to each worker"
    )
    diversity_every_steps: int = Field(
        default=80, ge=0, le=1_000_000, description="steps between measurements of gradient diversity; 0: none"
    )
    diversity_horizon_measurements: int = Field(
        default=50, ge=1, le=1_000_000, description="measurements of gradient diversity that are averaged over"
    )
    diversity_delta: float = Field(
        default=1, gt=0, le=1000, description="workers help while samples in flight are at most delta B_S + 1"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="start of every random choice of the server")
    # when it ends
    budget_updates: int | None = Field(default=None, ge=1, description="end after this many applied updates")
    budget_samples: int | None = Field(default=None, ge=1, description="end after this many training samples")
    budget_s: float | None = Field(default=None, gt=0, description="end after this many seconds")
    drain_s: float = Field(default=5, ge=0, le=3600, description="time for open transfers to end when the server stops")
    # what it keeps
    directory: Path | None = Field(
        default=None, description="where checkpoints and run log go; `serve` without one saves nothing"
    )
    checkpoint_interval_s: float = Field(default=60, gt=0, le=86_400, description="time between checkpoints")
    max_unsaved_age_s: float = Field(
        default=600, gt=0, le=604_800, description="refuse updates if nothing was saved for so long"
    )
    keep_checkpoints: int = Field(default=3, ge=1, le=10_000, description="latest checkpoints to keep")
    max_log_mib: int = Field(
        default=256, ge=1, le=1_048_576, description="size of the run log; the oldest part goes first"
    )
    arrivals: bool = Field(
        default=False, description="record in the directory all that arrives, for `paramserver replay --log`"
    )
    max_arrivals_mib: int = Field(
        default=1024, ge=1, le=1_048_576, description="size of all such records; when it is reached, recording ends"
    )
    adopt: bool = Field(default=False, description="let a returning worker refill a server that lost its state")
    allow_fresh: bool = Field(default=False, description="start anew when every checkpoint is corrupt")
    # whom it serves
    lease_s: float = Field(default=30, ge=1, le=86_400, description="a worker silent for this long is given up")
    init_timeout_s: float = Field(
        default=10, gt=0, le=3600, description="silence before another worker may send the first weights"
    )
    remember_session_h: float = Field(default=24, gt=0, le=8760, description="time for a worker given up to return")
    max_sessions: int = Field(default=256, ge=1, le=65_536, description="workers at one time")
    rejected_per_minute: int = Field(
        default=3, ge=1, le=1_000_000, description="rejected updates that quarantine a worker"
    )
    malformed_in_a_row: int = Field(default=3, ge=1, le=1_000_000, description="malformed messages that end a session")
    # what it may use
    max_elements: int = Field(default=2**31, ge=1, le=2**40, description="largest model, elements")
    pool_mib: int = Field(default=1024, ge=1, le=16_777_216, description="memory for open transfers, taken at start")
    memory_limit_mib: int | None = Field(
        default=None, ge=1, description="refuse workers that would take the server beyond"
    )
    kernel_threads: int | None = Field(
        default=None, ge=1, le=1024, description="threads that apply updates; without, one per core up to 8"
    )
    window_chunks: int = Field(default=8, ge=1, le=1024, description="chunks of 1 MiB under way to one receiver")

    def rule_config(self) -> Config:
        """The settings of the rule, all of them, as the rule takes them."""
        return rules.configure(rules.load(self.rule), self.rule_settings)

    def buffers_policy(self) -> str:
        """`buffers`, with what the rule wants in place of auto: average, leader or local."""
        return rules.load(self.rule).buffers if self.buffers == "auto" else self.buffers

    def terms(self) -> Terms:
        """What a rule may depend on beside its own settings."""
        return _terms({name: getattr(self, name) for name in type(self).model_fields})

    def tables(self) -> Mapping[str, BaseModel]:
        """`rule_settings` as the rule's own Config."""
        return {"rule_settings": self.rule_config()}

    @field_validator("bind")
    @classmethod
    def _bind_is_safe(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        public = [address for address in value if _is_public(address)]
        if len(set(value)) < len(value):
            raise _no("An address to bind is given twice.", fix="Name each address once.")
        if public and not info.data.get("insecure"):
            raise _no(
                f"Other machines could reach {', '.join(public)}, and encryption is not in this version.",
                fix="Bind tcp://127.0.0.1:PORT or ipc://PATH, or pass --insecure on a network you trust.",
            )
        return value

    @field_validator("rule_settings", mode="before")
    @classmethod
    def _rule_takes_them(cls, value: Any, info: ValidationInfo) -> Any:
        if "rule" not in info.data or not isinstance(value, Mapping):
            return value  # refused already, or by the type
        config = _carry(rules.configure, rules.load(info.data["rule"]), value)
        return config.model_dump(mode="json", include=set(value))

    @field_validator("max_clock_gap")
    @classmethod
    def _rule_fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        """The last of the settings that a rule may depend on is here: ask the rule."""
        known = info.data
        names = list(cls.model_fields)
        if not set(names[: names.index(str(info.field_name))]) <= known.keys():
            return value  # one of them is refused already
        rule = rules.load(known["rule"])
        terms = _terms(known | {"max_clock_gap": value})
        if refusal := rule.fits(rules.configure(rule, known["rule_settings"]), terms):
            raise _no(refusal, fix=f"`paramserver rules {rule.name}` tells its settings.")
        for choice in codecs.choices(known["codec"]):
            if misfit := _codec_refusal(rule, codecs.load(choice)):
                raise ValueError(misfit)
        if rule.schedules and known["replies"] == "difference":
            raise _no(
                f"replies 'difference' do not go with rule '{rule.name}', whose workers pull parameters as they are.",
                fix="Leave them whole, or choose a rule that answers pushes with the center, such as downpour.",
            )
        if (rule.schedules or rule.rounds) and known["lag_weight"] != "none":
            raise _no(
                f"lag_weight '{known['lag_weight']}' does not go with rule '{rule.name}', whose updates have no lag.",
                fix="Leave it out, or choose a rule that applies updates as they come.",
            )
        if rule.schedules and (known["max_lag"] is not None or known["local_steps_by"] != "fixed"):
            raise _no(
                f"Rule '{rule.name}' says itself when workers train: without max_lag and local_steps_by.",
                fix="Leave them out.",
            )
        held = rule.rounds or rule.private or rule.schedules
        if value is not None and held:
            raise _no(
                f"max_clock_gap {value} does not go with rule '{rule.name}', which has its own way to wait.",
                fix="Leave it out, or choose a rule that answers with the center at once, such as downpour.",
            )
        return value

    @field_validator("diversity_every_steps")
    @classmethod
    def _is_measured(cls, value: int, info: ValidationInfo) -> int:
        if value == 0 and info.data.get("local_steps_by") == "diversity":
            raise _no(
                "local_steps_by 'diversity' needs what diversity_every_steps 0 does not measure.",
                fix="Measure every so many steps, or set local_steps_by to fixed or speed.",
            )
        return value

    @field_validator("directory", mode="before")
    @classmethod
    def _is_named(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise _no("directory is empty.", fix="Name one, such as runs/first, or leave it out.")
        return value

    @field_validator("max_unsaved_age_s")
    @classmethod
    def _outlives_the_interval(cls, value: float, info: ValidationInfo) -> float:
        interval_s = info.data.get("checkpoint_interval_s", 0.0)
        if info.data.get("directory") is not None and value <= interval_s:
            raise _no(
                f"max_unsaved_age_s {value:g} would refuse updates before checkpoint_interval_s {interval_s:g} ends.",
                fix="Make it several times checkpoint_interval_s.",
            )
        return value

    @field_validator("memory_limit_mib")
    @classmethod
    def _holds_the_pool(cls, value: int | None, info: ValidationInfo) -> int | None:
        pool_mib = info.data.get("pool_mib", 0)
        if value is not None and value <= pool_mib:
            raise _no(
                f"memory_limit_mib {value} leaves no room for a model beside pool_mib {pool_mib}.",
                fix="Raise memory_limit_mib or lower pool_mib.",
            )
        return value


class WorkerSettings(Settings):
    """All that one worker is told; the rest it adopts from the server when it joins."""

    owner = "a worker"

    address: Address = Field(default="tcp://127.0.0.1:5555", description="the server's address, from its join line")
    name: str | None = Field(
        default=None, min_length=1, max_length=64, description="name on the server; without, host and process"
    )
    task: str = Field(default="digits", min_length=1, description="what to train: a built-in task, or FILE.py:FUNCTION")
    device: str = Field(default="cpu", min_length=1, description="torch device to train on, such as cpu or cuda:0")
    group: int | None = Field(default=None, ge=0, le=1024, description="group to be in, under a rule that has groups")
    optimizer: Literal["task", "sgd", "nesterov", "adamw"] = Field(
        default="task", description="inner optimizer of a built-in task, or its own choice"
    )
    mechanism: str | None = Field(
        default=None,
        max_length=64,
        description="on the gradient of each sample: dropconnect:P, langevin:SIGMA, quantise",
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="start of every random choice of the worker")
    connect_timeout_s: float = Field(
        default=30, gt=0, le=86_400, description="wait at start for a server that is not there yet"
    )

    @field_validator("address")
    @classmethod
    def _names_one_server(cls, value: str) -> str:
        tcp = _TCP.fullmatch(value)
        if tcp and (tcp["host"] == "*" or tcp["port"] in {"*", "0"}):
            raise _no(
                f"'{value}' is an address to bind, not one to connect to.",
                fix="Give the host and port that the server shows in its join line.",
            )
        return value


EVERY_MODEL: tuple[type[Settings], ...] = (ServerSettings, WorkerSettings)
"""An environment may hold settings of all of them."""

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """Settings, and for each name (`rule`, `rule_settings.kappa`) the origin: `default`, `file ps.toml`, ..."""

    settings: S
    origins: Mapping[str, str]


class Row(NamedTuple):
    """One setting as a user may read it; `value` is plain data, ready for JSON."""

    name: str
    value: Any
    origin: str
    description: str


def load(model: type[S], *, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Loaded[S]:
    """The settings of one model from all layers, the last being the strongest; raises ConfigError.

    `flags` maps a setting's name to its value; None and an empty list mean 'not given'.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(model.model_fields, "default")
    for name, given, origin in chain(_in_file(file), _in_environment(model, environ), _in_flags(flags)):
        field = model.model_fields.get(name)
        kind = get_origin(field.annotation) if field else None
        value, where = given, origin
        if kind is tuple:
            value = tuple(_parts(given))
        elif kind is dict:
            table = _table(name, given, origin)
            value = values.get(name, {}) | table
            origins |= {f"{name}.{key}": origin for key in table}
            where = f"{origins[name]}, {origin}" if name in values else origin
        values[name], origins[name] = value, where
    return Loaded(model.model_validate(values, context=origins), origins)


def describe(loaded: Loaded[S]) -> list[Row]:
    """Every setting with its value, origin and meaning, the keys of tables one by one, in the order of the fields."""
    return list(_rows(loaded.settings, "", loaded.settings.tables(), loaded.origins))


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return {"rule_settings": "--set"}.get(name, "--" + name.replace("_", "-"))


def allowed(field: FieldInfo) -> str:
    """What a field may be, in words: its kind and its range."""
    outer, inner = get_origin(field.annotation), get_args(field.annotation)
    kinds = [outer] if outer in _KINDS else [kind for kind in inner or [field.annotation] if kind is not NoneType]
    kind = " or ".join(f"'{kind}'" if isinstance(kind, str) else _KINDS[kind] for kind in kinds)
    pairs = ((words, getattr(bound, name, None)) for bound in field.metadata for name, words in _BOUNDS.items())
    bounds = [words.format(limit) for words, limit in pairs if limit is not None]
    return ", ".join([kind, *bounds])


_KINDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    tuple: "a list",
    dict: "a table",
}
_BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}

Given = tuple[str, Any, str]
"""Name, value and origin of one setting in one layer."""


def _in_file(file: Path | None) -> Iterator[Given]:
    if file is None:
        return
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The file {file} cannot be read: {error.strerror}.", fix="Check its path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"The file {file} is not UTF-8 text: {error.reason}.", fix="Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The file {file} is not TOML: {error}.", fix="Correct that line.") from None
    yield from ((name, value, f"file {file}") for name, value in settings.items())


_KUBERNETES = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT\w*)=.*|PORT=\w+://.*|PORT_\d+_\w+=.*)")


def _in_environment(model: type[Settings], environ: Mapping[str, str]) -> Iterator[Given]:
    others = set().union(*(other.model_fields for other in EVERY_MODEL)) - set(model.model_fields)
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or not text.strip() or name.lower() in others or _KUBERNETES.fullmatch(f"{name}={text}"):
            continue
        yield name.lower(), text.strip(), f"environment {variable}"


def _in_flags(flags: Mapping[str, Any]) -> Iterator[Given]:
    given = ((name, value) for name, value in flags.items() if value is not None and value != [] and value != ())
    yield from ((name, value, f"flag {flag(name)}") for name, value in given)


def _parts(value: Any) -> Iterator[Any]:
    """The items of a list, or of a text with commas, or of a list of such texts."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        yield from (part.strip() for part in item.split(",")) if isinstance(item, str) else [item]


def _table(name: str, value: Any, origin: str) -> dict[str, Any]:
    """A table as it is, or made of NAME=VALUE texts."""
    if isinstance(value, Mapping):
        return dict(value)
    table = {}
    for part in _parts(value):
        key, equals, text = (piece.strip() for piece in str(part).partition("="))
        if not (key and equals):
            raise ConfigError(f"'{part}' in '{name}' ({origin}) is not NAME=VALUE.", fix="Such as kappa=2.")
        table[key] = text
    return table


def _rows(model: BaseModel, prefix: str, tables: Mapping[str, BaseModel], origins: Mapping[str, str]) -> Iterator[Row]:
    values = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        if name in tables:
            yield from _rows(tables[name], f"{prefix}{name}.", {}, origins)
        else:
            full = prefix + name
            yield Row(full, values[name], origins.get(full, "default"), field.description or "")


def _refusal(model: type[Settings], first: ErrorDetails, origins: Mapping[str, str]) -> ConfigError:
    """What pydantic found, as a sentence with the name, the value, the origin, and what is allowed."""
    name = str(first["loc"][0])
    where = f" ({origins[name]})" if name in origins else ""
    field = model.model_fields.get(name)
    if field is None:
        for other in EVERY_MODEL:
            if name in other.model_fields:
                return ConfigError(
                    f"'{name}' is a setting of {other.owner}, not of {model.owner}{where}.", fix="Move it there."
                )
        return ConfigError(
            f"There is no setting '{name}'{discovery.nearest(name, model.model_fields.keys())}{where}.",
            fix=f"Known: {', '.join(model.model_fields)}.",
        )
    match first.get("ctx"):
        case {"error": ValueError(args=(ConfigError() as own,))}:
            if (
                name == "max_clock_gap" and origins.get(name, "default") == "default"
            ):  # it was only the last to be known
                return own
            if name == "rule_settings":
                return ConfigError(
                    f"{own.sentence} It came from{where.replace('(', '').replace(')', '')}.", fix=own.fix
                )
            return ConfigError(f"{own.sentence} It is setting '{name}'{where}.", fix=own.fix)
    message = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(
        f"Setting '{name}' cannot be {first['input']!r:.200}{where}: {message}.",
        fix=f"'{name}' is {allowed(field)}: {field.description}.",
    )
