"""`key: null` where a setting has no null: what was probably meant by it."""

from __future__ import annotations

import json

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def instead_of_null(model: type[BaseModel], path: list[str]) -> str:
    """ "0 turns it off", or what else to write for null at `path` below `model`."""
    field = _field(model, path)
    if field is None:
        return "needs a value"
    if field.description:
        return field.description
    if any(getattr(bound, "ge", None) == 0 for bound in field.metadata):
        return "0 turns it off"
    default = field.get_default(call_default_factory=True)
    if field.is_required() or isinstance(default, BaseModel):
        return "needs a value"
    shown = json.dumps(default, default=str)
    return "needs a value; " + (
        'write "" for none' if default == "" else f"leave it out for the default, {shown}"
    )


def _field(model: type[BaseModel], path: list[str]) -> FieldInfo | None:
    for number, part in enumerate(path):
        field = model.model_fields.get(part)
        if field is None or number == len(path) - 1:
            return field
        inner = field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        model = inner
    return None
