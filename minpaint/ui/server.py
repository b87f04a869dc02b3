"""The server of the painter page: who may speak to it, and what the page can ask of the studio.

Every request needs the token of this run, a Host that is served here and, if it has an Origin, the page's own.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from minpaint.engine.device import dtype_name
from minpaint.errors import InputError, MinpaintError, one_line
from minpaint.picture.image import alpha_of, open_image
from minpaint.settings import Settings
from minpaint.ui.studio import Studio

LARGEST, SMALL = 256 * 2**20, 2**18  # bytes of a request that brings a picture or a mask, and of any other
THUMBNAIL = 320  # pixels on the longer side
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
HEADERS = {  # of every answer: the browser keeps nothing, if not told so, and the page speaks to nobody else
    "content-security-policy": f"{POLICY}connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}
CLOSE = {"connection": "close"}  # what is still sent of a refused request is not read


class RefusedError(MinpaintError):
    """A request that is not answered, and its status code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def serve(studio: Studio, listening: socket.socket, token: str) -> None:
    """Serve until a signal stops it."""
    app = guard(Starlette(routes=routes(studio)), token, *listening.getsockname()[:2])
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False)
    config.timeout_graceful_shutdown = 2
    uvicorn.Server(config).run([listening])


def guard(app: ASGIApp, token: str, address: str, port: int) -> ASGIApp:
    """The app for those who know the token and call the server by its name."""
    public = not ipaddress.ip_address(address).is_loopback

    def is_named(host: str) -> bool:
        name, _, given = host.rpartition(":")
        try:  # an address is no other site's name that was made to point here (DNS rebinding)
            known = ipaddress.ip_address(name.strip("[]")).is_loopback or public
        except ValueError:
            known = name.lower() in ("localhost", socket.gethostname().lower() if public else "localhost")
        return known and given == str(port)

    def fault(request: Request) -> tuple[int, str] | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        given = request.headers.get("x-token") or request.query_params.get("token", "")
        if not is_named(host):
            return 421, "this is not a name of the server; use the URL that it printed"
        if origin not in (None, f"http://{host}"):
            return 403, "the request comes from another site"
        if not hmac.compare_digest(given.encode(), token.encode()):
            return 403, "the token is missing or wrong; use the URL that the server printed"
        return None

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = dict(message["headers"])
                message["headers"] = [
                    *({key.encode(): value.encode() for key, value in HEADERS.items()} | given).items()
                ]
            await send(message)

        if scope["type"] == "http":  # there are no websockets, and so no way around these checks
            found = fault(Request(scope))
            served = app if found is None else JSONResponse({"error": found[1]}, found[0], CLOSE)
            await served(scope, receive, answer)

    return guarded


async def body(request: Request, largest: int) -> bytes:
    """What a request brings; refused as soon as it is known to be too much."""
    content, told = bytearray(), request.headers.get("content-length", "0")
    too_much = RefusedError(413, f"too large: up to {largest // 2**10} KiB are taken")
    if not told.isdecimal() or int(told) > largest:
        raise too_much
    async for block in request.stream():
        content += block
        if len(content) > largest:
            raise too_much
    return bytes(content)


def form() -> list[dict[str, Any]]:
    """The fields of Settings, from which the page makes its form."""
    told = []
    for option in fields(Settings):
        given, default = option.metadata["arguments"], "" if option.default in (MISSING, None) else option.default
        number = given.get("type") in (int, float) or isinstance(default, (int, float))
        kind = "switch" if isinstance(default, bool) else "number" if number else "text"
        more = {"group": option.metadata["group"], "help": option.metadata["help"], "choices": given.get("choices")}
        told.append({"name": option.name, "kind": kind, "default": default, **more})
    return told


def as_settings(content: bytes) -> Settings:
    """Settings from the form's values by name, as JSON; those left out have their defaults."""
    try:
        given = json.loads(content)
        types = {option.name: option.metadata["arguments"].get("type") for option in fields(Settings)}
        return Settings(**{name: types[name](value) if types[name] else value for name, value in given.items()})
    except MinpaintError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"the settings are not understood ({error!r})") from None


def routes(studio: Studio) -> list[Route]:
    """What the page can ask for: methods, path, and the function that answers, given the request and its content."""

    def place(request: Request) -> Path:
        """A picture's folder; a name that is no number of a picture is never made a path."""
        name: str = request.path_params["picture"]
        if not (name.isascii() and name.isdecimal() and (studio.folder / name / "about.json").is_file()):
            raise RefusedError(404, "there is no such picture")
        return studio.folder / name

    def painting(request: Request) -> Path:
        """The file of a painting, which must be one of the results that its picture lists."""
        paintings = studio.about(place(request))["paintings"]
        name: str = request.path_params["file"]
        if name not in [result["file"] for each in paintings for result in each["results"]]:
            raise RefusedError(404, "there is no such painting")
        return place(request) / name

    def page(request: Request, _: bytes) -> Response:
        return HTMLResponse(files("minpaint.ui").joinpath("page.html").read_text(encoding="utf-8"))

    def begin(request: Request, _: bytes) -> dict[str, Any]:
        painter, places = studio.painter, [file.parent for file in studio.folder.glob("[0-9]*/about.json")]
        told = {"model": f"{painter.name} on {painter.device}, {dtype_name(painter.dtype)}", "form": form()}
        return told | {"pictures": [studio.about(each) for each in sorted(places, reverse=True)]}

    def view(request: Request, _: bytes) -> Response:
        """The picture or a painting as any browser can show it, made for looking only."""
        file = painting(request) if "file" in request.path_params else place(request)
        return _for_browser(file if file.is_file() else file / studio.about(file)["file"], request.query_params)

    def mask(request: Request, content: bytes) -> Any:
        if request.method == "PUT":
            return studio.keep_mask(place(request), content)
        return FileResponse(place(request) / "mask.png")

    def cancel(request: Request, _: bytes) -> None:
        for order in studio.orders:
            order.wanted &= order.told["order"] != request.path_params["order"]

    def take(request: Request, _: bytes) -> dict[str, Any]:
        """A painting as the next picture."""
        return studio.add(painting(request).read_bytes(), painting(request).name)

    def download(request: Request, _: bytes) -> Response:
        stem = Path(studio.about(place(request))["name"].replace("\\", "/")).stem
        return FileResponse(painting(request), filename=f"{stem}-{painting(request).name}")

    answers: dict[str, Callable[[Request, bytes], Any]] = {
        "GET /": page,
        "GET /begin": begin,
        "GET /orders": lambda request, _: [dict(order.told) for order in studio.orders[-50:]],
        "POST /orders/{order:int}/cancel": cancel,
        "POST /pictures": lambda request, content: studio.add(
            content, request.query_params.get("name", "picture")[:200]
        ),
        "GET /pictures/{picture}/view": view,
        "GET,PUT /pictures/{picture}/mask": mask,
        "POST /pictures/{picture}/plan": lambda request, content: studio.plan(place(request), as_settings(content)),
        "POST /pictures/{picture}/paint": lambda request, content: studio.order(place(request), as_settings(content)),
        "GET /pictures/{picture}/{file}/view": view,
        "GET /pictures/{picture}/{file}/download": download,
        "POST /pictures/{picture}/{file}/take": take,
    }

    async def answer(request: Request, function: Callable[[Request, bytes], Any]) -> Response:
        try:
            content = await body(request, LARGEST if request.url.path.endswith(("/mask", "/pictures")) else SMALL)
            answered = await run_in_threadpool(function, request, content)
            return answered if isinstance(answered, Response) else JSONResponse(answered)
        except Exception as error:  # one request's bad luck, as too little memory, is not the server's
            code = getattr(error, "code", 400 if isinstance(error, MinpaintError) else 500)
            told = {"error": one_line(str(error)) or type(error).__name__}
            return JSONResponse(told, code, CLOSE if code == 413 else None)

    listed = ((*each.partition(" ")[::2], partial(answer, function=function)) for each, function in answers.items())
    return [Route(path, function, methods=names.split(",")) for names, path, function in listed]


def _for_browser(file: Path, query: Any) -> Response:
    image, content = open_image(file), BytesIO()
    clear = alpha_of(image) is not None
    shown = image.convert("RGBA" if clear else "RGB")
    if "small" in query:
        shown.thumbnail((THUMBNAIL, THUMBNAIL))
    shown.save(content, "PNG" if clear else "JPEG", quality=95, compress_level=1)
    kept = {"cache-control": "private, max-age=3600"}  # the file behind an address of this run does not change
    return Response(content.getvalue(), headers=kept, media_type="image/png" if clear else "image/jpeg")
