"""What every answer passes through, those of a starting service and of unforeseen errors included."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from rollout_service.config import ServiceConfig
from rollout_service.http.access_log import AccessLog
from rollout_service.http.request_id import RequestIds

METHODS = "GET", "HEAD", "POST", "DELETE"
"""those of the service's routes"""
READABLE = "X-Request-Id", "X-Sampling", "Retry-After"
"""headers of answers that a page may read"""


def outermost(app: ASGIApp, config: ServiceConfig) -> ASGIApp:
    """`app` within what the configuration asks for. It stands around Starlette's own handler of unforeseen errors,
    which an application's middleware does not. CORS stands before the token, since preflights have none."""
    if config.cors.origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors.origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            allow_credentials=config.cors.credentials,
            expose_headers=READABLE,
        )
    app = RequestIds(app)
    return app if config.access_log == "off" else AccessLog(app, config.access_log)
