"""The web application of the playground: three files, and four requests."""

import contextlib
import functools
import importlib.resources
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.drawing.recipe import find_recipe
from diffusion_jax.runs.drawing.samples import Pictures, encode_samples
from diffusion_jax.runs.drawing.watched import OnStep
from diffusion_jax.runs.inputs.seeds import check_seeds
from diffusion_jax.serve.asking import Asked, describe, read
from diffusion_jax.serve.jobs import MOST_WAITING, Jobs

MOST_BYTES = 16 * 2**20
FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"),
         "/page.css": ("page.css", "text/css")}  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# Options of a call that its pictures tell.
_TOLD = ("negative", "num_steps", "guidance_scale")
# What drawn images tell besides, by name.
Facts = Mapping[str, Any]
NONE: Facts = MappingProxyType({})
# A sampler's name, "" for the config's -> the model with it; ValueError when it does not fit.
WithSampler = Callable[[str], Pipeline]


def make_app(
    with_sampler: WithSampler, token: str | None, hosts: list[str], model: str, more: Facts = NONE
) -> Starlette:
    """Make the application; drawn images tell the name of the model and `more` facts.

    token: what requests must know, None for a page that only this machine can reach. hosts: names
    under which it may be called; others are refused, so that no page of another site can.
    """
    about, jobs = describe(with_sampler("")), Jobs()

    async def look_at_model(request: Request) -> Response:
        return JSONResponse(about)

    async def draw(request: Request) -> Response:
        try:
            asked = read(_object(await _body(request)), with_sampler(""))
            pipe = with_sampler(asked.sampler)
        except ValueError as error:
            return _refused(400, str(error))
        job = jobs.add(functools.partial(_draw, pipe, asked, model, more))
        if job is None:
            return _refused(503, f"{MOST_WAITING} calls are waiting already; try again later")
        return JSONResponse({"id": job.id})

    async def look(request: Request) -> Response:
        found = jobs.find(request.path_params["job"])
        if found is None:
            return _refused(404, "this call is not known, or was forgotten")
        job, before = found
        if request.method == "DELETE":
            job.stop.set()
        return JSONResponse(job.report(before))

    async def image(request: Request) -> Response:
        found, index = jobs.find(request.path_params["job"]), request.path_params["index"]
        if found is None or not 0 <= index < len(found[0].images):
            return _refused(404, "there is no such image")
        return Response(found[0].images[index], media_type="image/png")

    async def grid(request: Request) -> Response:
        found = jobs.find(request.path_params["job"])
        if found is None or not found[0].grid:
            return _refused(404, "there is no such image")
        return Response(found[0].grid, media_type="image/png")

    routes = [
        *(Route(path, functools.partial(_file, *file)) for path, file in FILES.items()),
        Route("/api/model", look_at_model),
        Route("/api/jobs", draw, methods=["POST"]),
        Route("/api/jobs/{job:str}", look, methods=["GET", "DELETE"]),
        Route("/api/jobs/{job:str}/grid.png", grid),
        Route("/api/jobs/{job:str}/{index:int}.png", image),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        jobs.close()

    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(_Guard, token=token),
        ],
    )


def _draw(pipe: Pipeline, asked: Asked, model: str, more: Facts, on_step: OnStep) -> Pictures:
    """Draw what was asked for; each picture tells how."""
    images = pipe(asked.conditions, **asked.options, on_step=on_step)
    recorded = {name: asked.options[name] if name in asked.options else None for name in _TOLD}
    size, seed = images.shape[1:3], asked.options["seed"]
    shown = {"model": model, "seeds": check_seeds(seed), **recorded}
    recipe = find_recipe(
        pipe.experiment, asked.conditions, size, **shown, options=asked.options, more=more
    )
    return encode_samples(images, recipe)


class _Guard:
    """Add the headers of safety, and refuse requests to /api that do not know the token."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        if scope["type"] == "http" and scope["path"].startswith("/api") and self._token is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, f"Bearer {self._token}".encode()):
                refused = _refused(401, "open the address that the program printed, with its token")
                await refused(scope, receive, with_headers)
                return
        await self._app(scope, receive, with_headers)


async def _file(name: str, kind: str, request: Request) -> Response:
    text = (
        importlib.resources.files("diffusion_jax.serve").joinpath(name).read_text(encoding="utf-8")
    )
    return Response(text, media_type=kind)


async def _body(request: Request) -> bytes:
    # A page of another site can send a form, but no JSON without asking first.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise ValueError("the request should be JSON")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ValueError(f"the request has more than {MOST_BYTES >> 20} MiB; send less")
    return body


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the request should be JSON") from error
    if not isinstance(found, dict):
        raise ValueError("the request should be an object of fields")
    return found


def _refused(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything long begins; ValueError when it is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--host={host} --port={port} cannot be listened at: {reason}; choose another --port"
        ) from error


def run_server(app: Starlette, listener: socket.socket) -> None:
    """Serve until Ctrl-C."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
        server.run(sockets=[listener])
