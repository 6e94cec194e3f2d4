"""The pages /docs (Swagger UI) and /redoc. The service itself serves all their files."""

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

ASSETS_PATH = "/docs/assets"
OWN_FILES = Path(__file__).parent / "static"

# no-cache: the browser keeps a file, and asks with its ETag before each use.
FILE_HEADERS = {"Cache-Control": "no-cache"}

# Hashes of the two style elements that ReDoc's script adds: an empty one, which it fills rule by
# rule, and one with the rules of its scroll bars.
REDOC_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",
    "'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='",
)

# Every address is relative, so that the pages also work under a prefix that a proxy removes.
SWAGGER_UI = """\
<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>Payment service - Swagger UI</title>
    <link rel="icon" href="docs/assets/favicon.png">
    <link rel="stylesheet" href="docs/assets/swagger-ui.css">
    <link rel="stylesheet" href="docs/assets/page.css">
  </head>
  <body>
    <div id="swagger-ui"></div>
    <script src="docs/assets/swagger-ui-bundle.js"></script>
    <script src="docs/assets/swagger-ui-start.js"></script>
  </body>
</html>
"""
# The search is off: it starts a worker from a blob, which the policy does not allow.
REDOC = """\
<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>Payment service - ReDoc</title>
    <link rel="icon" href="docs/assets/favicon.png">
    <link rel="stylesheet" href="docs/assets/page.css">
  </head>
  <body>
    <redoc spec-url="openapi.json" disable-search="true"></redoc>
    <script src="docs/assets/redoc.standalone.js"></script>
  </body>
</html>
"""


class Assets(StaticFiles):
    """The files of both pages: those of this package and those of the package fastapi-offline."""

    def __init__(self) -> None:
        super().__init__(directory=OWN_FILES, packages=[("fastapi_offline", "static")])

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(FILE_HEADERS)
        return response


def add_documentation(app: FastAPI) -> None:
    """Add the pages and their files to the application."""
    app.add_route("/docs", get_swagger_ui, include_in_schema=False)
    app.add_route("/redoc", get_redoc, include_in_schema=False)
    app.mount(ASSETS_PATH, Assets())


async def get_swagger_ui(_: Request) -> Response:
    return _page(SWAGGER_UI)


async def get_redoc(_: Request) -> Response:
    return _page(REDOC, *REDOC_STYLES)


def _page(html: str, *style_hashes: str) -> Response:
    """Return a page with a policy: it can load from and send to this service only."""
    styles = " ".join(["'self'", *style_hashes])
    policy = (
        f"default-src 'none'; script-src 'self'; style-src {styles}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers=FILE_HEADERS | headers)
