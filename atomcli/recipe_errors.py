"""What is wrong with a recipe, as one sentence with the nearest valid word."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# What pydantic says about a value of the wrong type, in the words of a YAML file.
_WORDS = {
    "model_type": "must be a mapping of keys to values",
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
}


def did_you_mean(word: str, valid: Any) -> str:
    """The nearest valid word as the end of a sentence, or nothing where none is near."""
    nearest = difflib.get_close_matches(str(word), [str(each) for each in valid], n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def explain(error: ValidationError, recipe: type[BaseModel]) -> str:
    """One sentence about the first of pydantic's findings."""
    finding = error.errors()[0]
    location = tuple(part for part in finding["loc"] if part not in ("float", "literal['search']", "int"))
    key = ".".join(str(part) for part in location)
    if finding["type"] == "extra_forbidden":
        valid = _keys_at(recipe, location[:-1])
        return f"unknown key {key}; allowed are {', '.join(valid)}{did_you_mean(str(location[-1]), valid)}"
    if finding["type"] == "missing":
        return f"the key {key} is missing"
    message = _WORDS.get(finding["type"], finding["msg"].removeprefix("Value error, "))
    if finding["type"] == "literal_error":
        valid = [part.strip(" '") for part in finding["ctx"]["expected"].replace(" or ", ", ").split(",")]
        message = f"allowed are {', '.join(valid)}{did_you_mean(str(finding['input']), valid)}"
    if not key or isinstance(finding["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key} is {finding['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(recipe: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the section that a pydantic location points into."""
    model: Any = recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        model = _section_in(annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section_in(each))), None)
