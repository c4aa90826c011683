"""The complete configuration, with its sections checked against each other."""

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, model_validator

from ee_llm.config import checks
from ee_llm.config.base import Section
from ee_llm.config.errors import render
from ee_llm.config.limits import MAX_LAYERS
from ee_llm.config.model import ModelConfig
from ee_llm.config.schema import ConfigFields
from ee_llm.config.shapes import SHAPES
from ee_llm.errors import ConfigError


class Config(ConfigFields):
    """The complete configuration of a run.

    Raises:
        ConfigError: The configuration is not valid. The message has one line per problem.
    """

    if not TYPE_CHECKING:  # Type checkers derive the constructor from the fields.

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise ConfigError(render(error.errors(), option_names())) from None

        # Without this, pydantic validates through this constructor and wraps its error again.
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # With an empty model section, the error lists the options that a model needs.
        return _with_all_boundaries(_with_new_names({"model": {}, **given}))

    @model_validator(mode="after")
    def _resolve_and_check(self) -> "Config":
        if "seq_length" not in self.data.model_fields_set:
            length = {"seq_length": self.model.max_seq_length}
            object.__setattr__(self, "data", self.data.model_copy(update=length))
        if self.is_tuning and not self.tuning.exits:
            tuned = {"exits": self.exits.boundaries}
            object.__setattr__(self, "tuning", self.tuning.model_copy(update=tuned))
        problems = checks.problems(self)
        if problems:
            raise ConfigError("\n".join(problems))
        return self


# Old to new names of options that were renamed after version 0.1.0, by section.
_OLD_NAMES = {"data": {"mask_after_eod": "mask_after_eos"}}


def _with_new_names(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options with old names replaced by the current ones."""
    renamed = dict(given)
    for section, names in _OLD_NAMES.items():
        if isinstance(renamed.get(section), dict):
            options = renamed[section].items()
            renamed[section] = {names.get(name, name): value for name, value in options}
    return renamed


def _with_all_boundaries(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options with exits.boundaries = all replaced by the boundaries of all layers."""
    exits, model = given.get("exits"), given["model"]
    if not isinstance(exits, dict) or exits.get("boundaries") != "all":
        return given
    num_layers = None
    if isinstance(model, dict):
        preset = SHAPES.get(str(model.get("shape")), {})
        num_layers = model.get("num_layers", preset.get("num_layers"))
    elif isinstance(model, ModelConfig):
        num_layers = model.num_layers
    # If the number of layers is not valid, report only that.
    boundaries: tuple[int, ...] = ()
    if isinstance(num_layers, int) and 0 < num_layers <= MAX_LAYERS:
        boundaries = tuple(range(1, num_layers))
    return given | {"exits": exits | {"boundaries": boundaries}}


def section_types() -> dict[str, type[Section]]:
    """Return the section models by name, in the order of the file."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def option_names() -> list[str]:
    """Return the dotted names of all options and the names of the sections."""
    names = list(Config.model_fields)
    for section, model in section_types().items():
        names += [f"{section}.{field}" for field in model.model_fields]
    return names
