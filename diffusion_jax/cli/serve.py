"""`serve`: try a model on a page in the browser."""

import argparse
import importlib.util
import secrets

from diffusion_jax.devices.peers import is_loopback
from diffusion_jax.runs.drawing.recipe import loaded_facts, model_name
from diffusion_jax.runs.files.lora import parse_loras
from diffusion_jax.runs.inputs.embeddings import parse_embeddings


def run(arguments: argparse.Namespace) -> int:
    """Load a model, serve the page until Ctrl-C, and return 0."""
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise ValueError("serve needs starlette and uvicorn: pip install 'starlette<2' 'uvicorn<1'")
    from diffusion_jax.serve.app import listen, make_app, run_server
    from diffusion_jax.serve.loading import make_load

    if bool(arguments.workdir) == bool(arguments.checkpoint):
        raise ValueError("give --workdir=RUN or --checkpoint=FILE")
    loras, embeddings = parse_loras(arguments.lora), parse_embeddings(arguments.embedding)
    host, token = arguments.host, arguments.token or None
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(16)
    with listen(host, arguments.port) as listener:
        port = listener.getsockname()[1]
        hosts = ["127.0.0.1", "localhost", "[::1]"] if is_loopback(host) else ["*"]
        chosen = (arguments.workdir, arguments.checkpoint, arguments.config, arguments.overrides)
        model = model_name(arguments.workdir or arguments.checkpoint)
        facts = loaded_facts(loras=loras, embeddings=embeddings, overrides=arguments.overrides)
        load = make_load(*chosen, loras=loras, embeddings=embeddings)
        app = make_app(load, token, hosts, model, facts)
        shown = f"http://{host}:{port}/" + (f"#{token}" if token else "")
        print(f"open {shown}    (Ctrl-C ends it)", flush=True)
        run_server(app, listener)
    return 0
