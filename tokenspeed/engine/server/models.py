"""The one model, as OpenAI's and Anthropic's clients list models."""

import datetime
from typing import Any

from ..errors import RequestError
from .service import Service


class UnknownModel(RequestError):
    """A model that is not served."""


def model_list(service: Service) -> dict[str, Any]:
    card = _card(service)
    return {"object": "list", "data": [card], "first_id": card["id"], "last_id": card["id"], "has_more": False}


def model_card(service: Service, id: str) -> dict[str, Any]:
    """Raises UnknownModel."""
    if id != service.config.model_name:
        raise UnknownModel(f"The model {id!r:.80} does not exist; this server has {service.config.model_name!r}.")
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    name, started = service.config.model_name, service.started
    return {
        "id": name,
        "object": "model",
        "created": started,
        "owned_by": "tokenspeed",
        "max_model_len": service.room,
        # As Anthropic's clients read it.
        "type": "model",
        "display_name": name,
        "created_at": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": service.room,
        "max_tokens": service.room,
    }
