"""A configuration whose sections fit together."""

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, model_validator

from ee_llm.config import checks
from ee_llm.config.base import Section
from ee_llm.config.errors import render
from ee_llm.config.schema import ConfigFields
from ee_llm.errors import ConfigError


class Config(ConfigFields):
    """Everything that decides a run. Raises `ConfigError`, one line for each problem."""

    if not TYPE_CHECKING:  # type checkers keep the constructor that follows from the fields

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise ConfigError(render(error.errors(), option_names())) from None

        # pydantic would otherwise validate through this constructor and wrap its error once more.
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # With an empty model section, the error lists the options that a model needs.
        return _with_new_names({"model": {}, **given})

    @model_validator(mode="after")
    def _resolve_and_check(self) -> "Config":
        if "seq_length" not in self.data.model_fields_set:
            length = {"seq_length": self.model.max_seq_length}
            object.__setattr__(self, "data", self.data.model_copy(update=length))
        if self.is_tuning and not self.tuning.exits:
            tuned = {"exits": self.exits.boundaries}
            object.__setattr__(self, "tuning", self.tuning.model_copy(update=tuned))
        found = checks.problems(self)
        if found:
            raise ConfigError("\n".join(found))
        return self


# Options that version 0.1.0 had under another name, by section.
_OLD_NAMES = {"data": {"mask_after_eod": "mask_after_eos"}}


def _with_new_names(given: dict[str, Any]) -> dict[str, Any]:
    """Return options with the names that older versions gave them replaced."""
    found = dict(given)
    for section, names in _OLD_NAMES.items():
        if isinstance(found.get(section), dict):
            options = found[section].items()
            found[section] = {names.get(name, name): value for name, value in options}
    return found


def section_types() -> dict[str, type[Section]]:
    """The section models by name, in the order of the file."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def option_names() -> list[str]:
    """The dotted names of all options, and the names of the sections."""
    names = list(Config.model_fields)
    for section, model in section_types().items():
        names += [f"{section}.{field}" for field in model.model_fields]
    return names
