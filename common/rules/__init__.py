"""Update rules by name: what lies in this folder is what there is.

rule = rules.load("gem")                             the rule of that name
config = rules.configure(rule, {"kappa": 2.0})       its own Config
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from common import discovery
from common.errors import ConfigError
from common.rules.base import Config, Rule

HELPERS = ("base", "elastic", "rounds")


def names() -> tuple[str, ...]:
    """Names of all rules, sorted."""
    return discovery.names(__name__, helpers=HELPERS)


def load(name: str) -> Rule:
    """The rule of that name; raises ConfigError that lists what there is."""
    rule: Rule = discovery.load(__name__, name, attribute="RULE", kind="rule", helpers=HELPERS)
    return rule


def configure(rule: Rule, settings: Mapping[str, Any]) -> Config:
    """The rule's own Config from plain values; raises ConfigError that names the setting and what it may be."""
    known = rule.Config.model_fields
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"Rule '{rule.name}' has no setting '{name}'{discovery.nearest(name, known)}.",
                fix=f"Its settings: {', '.join(known) or 'none'}.",
            )
    try:
        return rule.Config.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        doc = known[name].description if name in known else ""
        own = first.get("ctx", {}).get("error")
        message = str(own) if isinstance(own, ValueError) else first["msg"][0].lower() + first["msg"][1:]
        if not name:  # settings that do not go together
            raise ConfigError(f"These settings of rule '{rule.name}' do not go together: {message}.") from None
        raise ConfigError(
            f"Setting '{name}' of rule '{rule.name}' cannot be {first['input']!r}: {message}.",
            fix=f"'{name}' is {doc}." if doc else "",
        ) from None
