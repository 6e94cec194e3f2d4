"""The pages /docs (Swagger UI) and /redoc, with every file they need served from here."""

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

ASSETS_PATH = "/docs/assets"
OWN_FILES = Path(__file__).parent / "static"

# no-cache: kept by the browser, and used once the ETag has proved that it is still what is served.
FILE_HEADERS = {"Cache-Control": "no-cache"}

# The two style elements that ReDoc's script opens: one that is empty and filled rule by rule, and
# the rules of its scroll bars, which are these and no others.
REDOC_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",
    "'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='",
)

# Every address is relative, so that the pages also work under a prefix that a proxy takes off.
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
# Its search would need a worker made of a blob, which the policy does not allow.
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
    """The files of both pages: this service's own, and those that fastapi-offline brings."""

    def __init__(self) -> None:
        super().__init__(directory=OWN_FILES, packages=[("fastapi_offline", "static")])

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(FILE_HEADERS)
        return response


def add_documentation(app: FastAPI) -> None:
    app.add_route("/docs", get_swagger_ui, include_in_schema=False)
    app.add_route("/redoc", get_redoc, include_in_schema=False)
    app.mount(ASSETS_PATH, Assets())


async def get_swagger_ui(_: Request) -> Response:
    return _page(SWAGGER_UI)


async def get_redoc(_: Request) -> Response:
    return _page(REDOC, *REDOC_STYLES)


def _page(html: str, *style_hashes: str) -> Response:
    """Answer a page that can load nothing from elsewhere, and send nothing there."""
    styles = " ".join(["'self'", *style_hashes])
    policy = (
        f"default-src 'none'; script-src 'self'; style-src {styles}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers=FILE_HEADERS | headers)
