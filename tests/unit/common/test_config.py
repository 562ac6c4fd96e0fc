"""Settings: the strongest layer wins, every value knows its origin, and what cannot work is refused in plain words."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common import codecs
from common.config import (
    EVERY_MODEL,
    Loaded,
    ServerSettings,
    Settings,
    WorkerSettings,
    allowed,
    describe,
    flag,
    load,
)
from common.errors import ConfigError

FIELDS = [(model, name) for model in EVERY_MODEL for name in model.model_fields]


def server(
    *, file: Path | None = None, environ: Mapping[str, str] | None = None, **flags: Any
) -> Loaded[ServerSettings]:
    return load(ServerSettings, file=file, environ=environ or {}, flags=flags)


def refusal(**layers: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        server(**layers)
    assert caught.value.fix, "every refusal says what to do"
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "ps.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- layers and origins ---


def test_a_stronger_layer_wins_and_each_value_knows_its_origin(toml: Any) -> None:
    file = toml("lease_s = 1.5\nseed = 1\nlocal_steps = 1\n")
    environ = {"PARAMSERVER_SEED": "2", "PARAMSERVER_LOCAL_STEPS": "2", "HOME": "elsewhere"}
    loaded = server(file=file, environ=environ, local_steps=3)
    settings = loaded.settings
    assert (settings.drain_s, settings.lease_s, settings.seed, settings.local_steps) == (5.0, 1.5, 2, 3)
    assert [loaded.origins[name] for name in ("drain_s", "lease_s", "seed", "local_steps")] == [
        "default",
        f"file {file}",
        "environment PARAMSERVER_SEED",
        "flag --local-steps",
    ]


def test_nothing_given_is_the_defaults() -> None:
    loaded = server()
    assert loaded.settings == ServerSettings()
    assert set(loaded.origins.values()) == {"default"}
    assert set(loaded.origins) == set(ServerSettings.model_fields)


@pytest.mark.parametrize("absent", [None, [], ()])
def test_a_flag_that_was_not_given_changes_nothing(absent: Any) -> None:
    loaded = server(environ={"PARAMSERVER_BIND": "ipc:///run/ps"}, bind=absent)
    assert loaded.settings.bind == ("ipc:///run/ps",)
    assert loaded.origins["bind"] == "environment PARAMSERVER_BIND"


def test_a_flag_may_switch_off_what_the_file_switched_on(toml: Any) -> None:
    assert server(file=toml("overlap = true")).settings.overlap is True
    assert server(file=toml("overlap = true"), overlap=False).settings.overlap is False


def test_an_empty_environment_variable_is_not_given() -> None:
    assert server(environ={"PARAMSERVER_RULE": " "}).origins["rule"] == "default"


@pytest.mark.parametrize(
    "given", ["tcp://127.0.0.1:1, ipc://a", ["tcp://127.0.0.1:1", "ipc://a"], ["tcp://127.0.0.1:1,ipc://a"]]
)
def test_a_list_may_be_a_text_with_commas(given: Any) -> None:
    assert server(bind=given).settings.bind == ("tcp://127.0.0.1:1", "ipc://a")


def test_text_becomes_the_type_of_the_setting() -> None:
    environ = {"OVERLAP": "yes", "MAX_SESSIONS": "7", "LEASE_S": "2.5", "DIRECTORY": "state", "BUDGET_UPDATES": "10"}
    settings = server(environ={f"PARAMSERVER_{name}": text for name, text in environ.items()}).settings
    assert settings.overlap is True
    assert (settings.max_sessions, settings.lease_s, settings.budget_updates) == (7, 2.5, 10)
    assert settings.directory == Path("state")


def test_rule_settings_are_merged_key_by_key(toml: Any) -> None:
    file = toml('rule = "gem"\n[rule_settings]\nkappa = 1\nmu = 0.5\nclamp = 4\n')
    loaded = server(file=file, environ={"PARAMSERVER_RULE_SETTINGS": "kappa=2, mu=0.6"}, rule_settings=["kappa=3"])
    assert loaded.settings.rule_settings == {"kappa": 3.0, "mu": 0.6, "clamp": 4.0}
    origins = {name: origin for name, origin in loaded.origins.items() if name.startswith("rule_settings.")}
    assert origins == {
        "rule_settings.kappa": "flag --set",
        "rule_settings.mu": "environment PARAMSERVER_RULE_SETTINGS",
        "rule_settings.clamp": f"file {file}",
    }


def test_rule_settings_come_out_typed_as_the_rule_wants_them() -> None:
    settings = server(rule="gem", rule_settings=["kappa=2", "any_optimizer=true", "variant=paper"]).settings
    assert settings.rule_settings == {"kappa": 2.0, "any_optimizer": True, "variant": "paper"}
    assert isinstance(settings.rule_settings["kappa"], float)
    assert settings.rule_config().model_dump()["mu"] == 0.9, "those not given have the rule's defaults"


# --- names that are no setting ---


def test_an_unknown_name_in_the_file_names_the_nearest(toml: Any) -> None:
    file = toml("lokal_steps = 3")
    text = refusal(file=file)
    assert "'lokal_steps'" in text
    assert "did you mean 'local_steps'" in text
    assert f"file {file}" in text


def test_an_unknown_variable_names_the_nearest() -> None:
    text = refusal(environ={"PARAMSERVER_LOKAL_STEPS": "3"})
    assert "did you mean 'local_steps'" in text
    assert "environment PARAMSERVER_LOKAL_STEPS" in text


def test_an_unknown_flag_names_the_nearest() -> None:
    assert "did you mean 'codec'" in refusal(kodec="fp32")


def test_one_environment_serves_server_and_workers() -> None:
    environ = {"PARAMSERVER_DEVICE": "cuda:0", "PARAMSERVER_RULE": "gem", "PARAMSERVER_SEED": "4"}
    loaded = load(WorkerSettings, file=None, environ=environ, flags={})
    assert (loaded.settings.device, loaded.settings.seed) == ("cuda:0", 4)
    assert server(environ=environ).settings.rule == "gem"


def test_a_file_belongs_to_one_of_them(toml: Any) -> None:
    assert "'device' is a setting of a worker, not of the server" in refusal(file=toml("device = 'cpu'"))


def test_what_kubernetes_sets_for_a_service_of_our_name_is_ignored() -> None:
    address = "tcp://10.0.0.7:5555"
    names = ("SERVICE_HOST", "SERVICE_PORT_ZMQ", "PORT_5555_TCP_ADDR", "0_SERVICE_HOST", "PORT", "HEADLESS_PORT")
    loaded = server(environ={f"PARAMSERVER_{name}": address for name in names})
    assert loaded.settings == ServerSettings()
    assert "'port'" in refusal(environ={"PARAMSERVER_PORT": "5555"}), "a person's mistake is still told"


# --- values that are not allowed ---


@pytest.mark.parametrize("value", [0, 1_000_001, -1, 1.5, "many", True, None])
def test_out_of_range_names_setting_value_origin_range_and_meaning(toml: Any, value: Any) -> None:
    given = {"environ": {"PARAMSERVER_LOCAL_STEPS": "0"}} if value is None else {"local_steps": value}
    origin = "environment PARAMSERVER_LOCAL_STEPS" if value is None else "flag --local-steps"
    text = refusal(**given)
    for part in ("'local_steps'", repr("0" if value is None else value), origin, "at least 1", "at most 1000000"):
        assert part in text
    assert str(ServerSettings.model_fields["local_steps"].description) in text


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["budget_s", "lease_s", "checkpoint_interval_s"])
def test_no_setting_is_nan_or_infinite(name: str, number: str) -> None:
    assert f"'{name}'" in refusal(**{name: number})


@pytest.mark.parametrize("name", ["budget_updates", "budget_samples", "budget_s"])
def test_a_budget_is_above_zero(name: str) -> None:
    assert f"'{name}'" in refusal(**{name: 0})


def test_a_choice_lists_what_there_is() -> None:
    assert "'auto' or 'average' or 'leader' or 'local'" in refusal(buffers="both")


def test_a_very_long_value_does_not_fill_the_screen() -> None:
    assert len(refusal(local_steps="9" * 100_000)) < 1000


@pytest.mark.parametrize(("name", "close"), [("rule", "gem"), ("codec", "fp32"), ("reply_codec", "fp32")])
def test_an_unknown_algorithm_names_the_nearest_and_its_origin(name: str, close: str) -> None:
    text = refusal(environ={f"PARAMSERVER_{name.upper()}": close[:-1] + "x"})
    assert f"did you mean '{close}'" in text
    assert f"'{name}' (environment PARAMSERVER_{name.upper()})" in text


@pytest.mark.parametrize(
    ("rule", "codec", "parts"),
    [
        ("easgd", "topk", ("counted twice", "Use plain:topk.")),
        ("easgd", "int4:32", ("counted twice", "Use plain:int4:32.")),
        ("eamsgd", "ef:int8", ("counted twice", "Use int8.")),
        ("easgd", "ef:randomk", ("counted twice", "Use another codec.")),
        ("easgd", "terngrad", ("may enlarge",)),
        ("easgd", "qsgd:1", ("may enlarge",)),
        ("lsgd", "int4", ("uploads parameters as they are",)),
        ("lsgd", "natural", ("uploads parameters as they are",)),
        ("downpour", "plain:sign", ("loses most of an update", "Use sign,")),
        ("gem", "plain:topk:0.05", ("nothing brings it back", "Use topk:0.05,")),
        ("downpour", "ef:natural", ("nothing to feed back",)),
    ],
)
def test_a_codec_that_makes_no_sense_under_the_rule_is_refused_in_words(
    rule: str, codec: str, parts: tuple[str, ...]
) -> None:
    text = refusal(rule=rule, codec=codec)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("rule", "codec"),
    [
        *((rule, "ef:topk:0.05") for rule in ("downpour", "gem", "adag", "diloco", "local_sgd", "fedbuff")),
        ("easgd", "plain:topk"),
        ("easgd", "natural"),
        ("lsgd", "int8:256"),
        ("downpour", "randomk"),
        ("downpour", "plain:int4"),
    ],
)
def test_a_codec_that_makes_sense_is_taken(rule: str, codec: str) -> None:
    assert server(rule=rule, codec=codec).settings.codec == codecs.load(codec).name


@pytest.mark.parametrize(
    ("setting", "shown", "choices"),
    [
        ("auto", "auto", ("fp32", "bf16", "int8")),
        ("auto:int8:1024", "auto", ("fp32", "bf16", "int8")),
        ("auto:int8:256", "auto:int8:256", ("fp32", "bf16", "int8:256")),
        ("auto:fp16", "auto:fp16", ("fp32", "fp16")),
        ("auto:ef:int4", "auto:int4", ("fp32", "bf16", "int8", "int4")),
        ("auto:topk:0.05", "auto:topk:0.05", ("fp32", "bf16", "int8", "topk:0.05")),
    ],
)
def test_auto_leaves_what_loses_no_more_than_is_allowed(setting: str, shown: str, choices: tuple[str, ...]) -> None:
    found = server(codec=setting).settings
    assert found.codec == shown
    assert codecs.choices(found.codec) == choices
    assert {"auto", *(choice.split(":")[0] for choice in choices)} <= set(codecs.words(shown))
    assert not found.terms().lossless


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"codec": "auto:fp32"}, "leaves nothing to choose"),
        ({"codec": "auto:auto"}, "'auto' is no codec"),
        ({"codec": "ef:auto"}, "'auto' is no codec"),
        ({"codec": "auto:int9"}, "did you mean 'int8'"),
        ({"reply_codec": "auto"}, "It is a value of `codec` alone"),
        ({"rule": "easgd", "codec": "auto:int4"}, "counted twice"),
        ({"rule": "lsgd", "codec": "auto:topk"}, "uploads parameters as they are"),
    ],
)
def test_auto_is_refused_where_one_of_its_codecs_would_be(settings: dict[str, Any], part: str) -> None:
    assert part in refusal(**settings)


@pytest.mark.parametrize("codec", ["int4", "ef:int8", "topk", "qsgd", "bf16:stochastic", "plain:e3m0"])
def test_replies_are_complete_in_themselves(codec: str) -> None:
    assert "cannot carry replies" in refusal(reply_codec=codec)


@pytest.mark.parametrize(
    ("rule", "reply_codec"),
    [
        *(("downpour", name) for name in ("int8", "fp16", "plain:int4", "plain:topk:0.05", "natural", "plain:sign")),
        *((rule, "plain:int4") for rule in ("gem", "diloco", "local_sgd", "easgd", "fedbuff")),
    ],
)
def test_differences_travel_in_what_contracts(rule: str, reply_codec: str) -> None:
    assert server(rule=rule, replies="difference", reply_codec=reply_codec).settings.reply_codec == reply_codec


@pytest.mark.parametrize(
    ("reply_codec", "parts"),
    [
        (None, ("as long as the center itself", "--reply-codec int8")),
        ("fp32", ("as long as the center itself",)),
        ("int4", ("counted twice", "Use plain:int4.")),
        ("ef:int8", ("counted twice", "Use int8.")),
        ("topk", ("counted twice", "Use plain:topk.")),
        ("ef:randomk", ("counted twice", "Use another codec.")),
        ("randomk", ("may enlarge",)),
        ("terngrad", ("may enlarge",)),
    ],
)
def test_differences_take_no_feedback_and_only_what_contracts(reply_codec: str | None, parts: tuple[str, ...]) -> None:
    text = refusal(replies="difference", reply_codec=reply_codec)
    assert all(part in text for part in parts), text
    assert "reply_codec" in text


def test_parameters_that_are_pulled_are_no_differences() -> None:
    assert "whose workers pull parameters as they are" in refusal(rule="lsgd", replies="difference", reply_codec="int8")


@pytest.mark.parametrize(
    ("pairs", "part"),
    [
        (["kapa=2"], "did you mean 'kappa'"),
        (["kappa=99"], "'kappa' of rule 'gem' cannot be '99'"),
        (["kappa"], "'kappa' in 'rule_settings' (flag --set) is not NAME=VALUE"),
        ([{"kappa": 1}], "is not NAME=VALUE"),
    ],
)
def test_rule_settings_are_the_rules_own(pairs: Any, part: str) -> None:
    text = refusal(rule="gem", rule_settings=pairs)
    assert part in text
    assert "flag --set" in text


def test_settings_of_another_rule_are_refused_not_dropped(toml: Any) -> None:
    file = toml('rule = "gem"\n[rule_settings]\nkappa = 2\n')
    assert "Rule 'downpour' has no setting 'kappa'" in refusal(file=file, rule="downpour")


@pytest.mark.parametrize("text", ["rule_settings = 3", "[rule_settings]\nkappa = { a = 1 }", "bind = [5]", "bind = []"])
def test_a_value_of_the_wrong_shape_is_refused(toml: Any, text: str) -> None:
    refusal(file=toml('rule = "gem"\n' + text))


# --- combinations ---


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.1.2.3", "eth0", "[::]", "[2001:db8::1]", "example.org"])
def test_a_public_address_needs_the_word_insecure(host: str) -> None:
    address = f"tcp://{host}:5555"
    text = refusal(bind=["tcp://127.0.0.1:5555", address])
    for part in (address, "encryption is not in this version", "127.0.0.1", "ipc://", "--insecure", "flag --bind"):
        assert part in text
    assert server(bind=address, insecure=True).settings.bind == (address,)


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:5555", "tcp://127.9.9.9:0", "tcp://localhost:*", "tcp://[::1]:1", "ipc:///a", "ipc://@a"],
)
def test_an_address_of_this_machine_needs_nothing(address: str) -> None:
    assert server(bind=address).settings.bind == (address,)


@pytest.mark.parametrize(
    "address", ["", "5555", "127.0.0.1:5555", "tcp://127.0.0.1", "tcp://:5", "tcp://h:65536", "udp://h:1", "ipc://", "tcp://::1:5"]
)  # fmt: skip
def test_an_address_is_well_formed(address: str) -> None:
    text = refusal(bind=[address], insecure=True)
    assert "is not an address" in text
    assert "tcp://HOST:PORT" in text


def test_an_address_is_bound_once() -> None:
    assert "twice" in refusal(bind="ipc://a,ipc://a")


@pytest.mark.parametrize("address", ["tcp://*:5555", "tcp://host:0", "tcp://host:*"])
def test_a_worker_connects_to_one_server(address: str) -> None:
    with pytest.raises(ConfigError, match="not one to connect to"):
        load(WorkerSettings, file=None, environ={}, flags={"address": address})


def test_unsaved_updates_may_grow_older_than_one_interval() -> None:
    assert "checkpoint_interval_s 700" in refusal(directory="state", checkpoint_interval_s=700)
    assert server(directory="state", checkpoint_interval_s=700, max_unsaved_age_s=7000).settings.directory is not None
    assert server(checkpoint_interval_s=700).settings.directory is None, "without a directory nothing is saved anyway"


def test_the_pool_leaves_room_for_a_model() -> None:
    assert "pool_mib 1024" in refusal(memory_limit_mib=1024)
    assert server(memory_limit_mib=1024, pool_mib=64).settings.memory_limit_mib == 1024


# --- the file itself ---


def test_bad_toml_names_file_and_line(toml: Any) -> None:
    file = toml('rule = "gem"\nseed = = 3\n')
    text = refusal(file=file)
    assert str(file) in text
    assert "line 2" in text


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'rule = "\xe9"')
    for file in (tmp_path / "absent.toml", tmp_path, tmp_path / "latin.toml"):
        assert str(file) in refusal(file=file)


# --- however they are made ---


def test_settings_made_directly_refuse_in_the_same_words() -> None:
    with pytest.raises(ConfigError, match=r"Setting 'local_steps' cannot be 0: .*at least 1"):
        ServerSettings(local_steps=0)
    with pytest.raises(ConfigError, match="did you mean 'local_steps'"):
        ServerSettings.model_validate({"lokal_steps": 1})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServerSettings().seed = 3


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_settings_survive_a_trip_to_another_process(model: type[Settings]) -> None:
    settings = model()
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert model.model_validate_json(settings.model_dump_json()) == settings


# --- listing ---


def test_describe_lists_every_setting_with_its_origin(toml: Any) -> None:
    rows = {row.name: row for row in describe(server(rule="gem", rule_settings="kappa=2"))}
    assert set(ServerSettings.model_fields) - set(rows) == {"rule_settings"}, "a table is listed key by key"
    assert rows["rule_settings.kappa"][1:3] == (2.0, "flag --set")
    assert rows["rule_settings.mu"][1:3] == (0.9, "default")
    assert rows["rule"][1:3] == ("gem", "flag --rule")
    assert all(row.description for row in rows.values())
    json.dumps([row._asdict() for row in rows.values()])


@pytest.mark.parametrize(("model", "name"), FIELDS)
def test_every_setting_is_described_and_bounded(model: type[Settings], name: str) -> None:
    field = model.model_fields[name]
    assert field.description
    assert "\n" not in field.description
    assert len(field.description) <= 90
    assert flag(name).startswith("--")
    assert not field.is_required(), "no setting is required"
    if "number" in allowed(field):
        assert "at least" in allowed(field) or "above" in allowed(field)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local_steps", "a whole number, at least 1, at most 1000000"),
        ("budget_s", "a number, above 0"),
        ("overlap", "true or false"),
        ("buffers", "'auto' or 'average' or 'leader' or 'local'"),
        ("directory", "a path"),
        ("bind", "a list, at least 1 long"),
        ("rule_settings", "a table"),
    ],
)
def test_what_is_allowed_reads_as_words(name: str, words: str) -> None:
    assert allowed(ServerSettings.model_fields[name]) == words


@pytest.mark.parametrize(("model", "name"), FIELDS)
def test_a_quantity_ends_in_its_unit(model: type[Settings], name: str) -> None:
    if allowed(model.model_fields[name]).startswith("a number"):
        assert name.endswith(("_s", "_h", "_exponent", "_delta"))  # an exponent and delta have no unit
