"""The error of a YAML file, in one sentence that names file, key and what is allowed there."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from pdtrim_deploy.recipe.yaml_units import Origins


def sentence(model: type[BaseModel], error: ValidationError, origins: Origins) -> str:
    """The first error of a file that should be a `model`, as `file: key ...; allowed: ...`."""
    first = error.errors()[0]
    loc = tuple(str(part) for part in first["loc"])
    key, where, value = ".".join(loc), origins.file_of(loc), first["input"]
    match first["type"]:
        case "extra_forbidden":
            return f"{where}: {key} is not a known key; allowed here: {', '.join(_keys_at(model, loc[:-1]))}"
        case "missing":
            return f"{where}: {key} is missing; allowed: {_allowed(model, loc)}"
        case "value_error":
            return f"{where}: {key + '.' if key else ''}{first['msg'].removeprefix('Value error, ')}"
        case "model_type":
            return f"{where}: {key} is {value!r}; allowed: a mapping with {', '.join(_keys_at(model, loc))}"
        case "finite_number":
            finite = _allowed(model, loc).replace("a number", "a finite number", 1)
            return f"{where}: {key} is {value}; allowed: {finite}"
        case _:
            return f"{where}: {key} is {value!r}; allowed: {_allowed(model, loc)}"


def _keys_at(model: type[BaseModel], loc: tuple[str, ...]) -> list[str]:
    keys = list(_schema_at(model, loc)["properties"])
    return keys if loc else ["include", *keys]


def _allowed(model: type[BaseModel], loc: tuple[str, ...]) -> str:  # noqa: PLR0911 (a line for each kind of value)
    schema = _schema_at(model, loc)
    if "properties" in schema:
        return f"a mapping with {', '.join(schema['properties'])}"
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "pattern" in schema or schema.get("type") == "object":
        return schema["description"]
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {_allowed(model, (*loc, '0'))}"
    if schema["type"] == "array" and "maxItems" in schema:
        return f"a list of {schema['minItems']} or {schema['maxItems']}, each {_allowed(model, (*loc, '0'))}"
    if schema["type"] == "array":
        return f"a list of one or more of {_allowed(model, (*loc, '0'))}"
    if schema["type"] == "number":
        return _number(schema)
    low = schema.get("minimum", schema["exclusiveMinimum"] + 1 if "exclusiveMinimum" in schema else None)
    kind = {"integer": "an integer", "string": "text", "boolean": "true or false"}[schema["type"]]
    if "maximum" in schema:
        return f"{kind} from {low} to {schema['maximum']}"
    return kind if low is None else f"{kind} of at least {low}"


def _number(schema: dict) -> str:
    phrases = {"exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below", "maximum": "up to"}
    bounds = [f"{word} {schema[key]:g}" for key, word in phrases.items() if key in schema]
    return " ".join(["a number", " and ".join(bounds)]).rstrip()


def _schema_at(model: type[BaseModel], loc: tuple[str, ...]) -> dict:
    schema = root = model.model_json_schema()
    for part in loc:
        inside = schema.get("items") or schema.get("prefixItems", [None])[0]
        inside = inside or schema.get("additionalProperties")  # of a mapping whose keys are anybody's
        schema = inside or schema["properties"][part]
        schema = next((kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"), schema)
        if "$ref" in schema:
            schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema
