"""HTTP around the application: HEAD, and pages of other origins."""

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
