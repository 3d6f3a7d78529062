"""The JSON schema of a configuration, by which YAML editors complete and check."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from jaxdistill.config.describe import meaning
from jaxdistill.config.model_keys import is_tag


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema (2020-12) of what `load` takes for `model`, each key with its meaning. References to
    other keys (`${a.b}`), which stand for a value of any kind, pass where text would."""
    return model.model_json_schema(schema_generator=_Schema, mode="validation") | {
        "$schema": "https://json-schema.org/draft/2020-12/schema"
    }


class _Schema(GenerateJsonSchema):
    """Says what `load` asks beyond pydantic's own account: the key that tells the members of a union apart
    must be given, although each member has its own word as a default. Adds the meanings that stand in the
    docstrings of a section."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        found = super().model_schema(schema)
        found.pop("title", None)  # the class's name, which says nothing to who writes YAML
        model: type[BaseModel] = schema["cls"]
        for name, value in found.get("properties", {}).items():
            if said := meaning(model, name):
                value.setdefault("description", said)
        tags = [name for name, field in model.model_fields.items() if is_tag(field)]
        if tags:
            found["required"] = sorted({*found.get("required", ()), *tags})
        return found
