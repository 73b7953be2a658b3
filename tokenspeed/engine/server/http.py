"""HTTP around the application: HEAD, pages of other origins, and the form of an error."""

from typing import Any

from starlette.middleware.cors import CORSMiddleware


class HeadRequests:
    """Answers HEAD as GET; uvicorn leaves the body out. Clients ask with it whether a server is there."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def allow_origins(app, origins: tuple[str, ...]) -> None:
    """Let pages of these origins ("*" for all) use the API from a browser; none may without this."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["retry-after"],
        )


def error_form(status: int, kind: str, message: str, **more: Any) -> dict[str, Any]:
    """An error as OpenAI's clients read it; `type` at the top is for Anthropic's."""
    return {"type": "error", "error": {"message": message, "type": kind, "code": status, "param": None} | more}
