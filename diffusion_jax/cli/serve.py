"""`serve`: try a model on a page in the browser."""

import argparse
import functools
import importlib.util
import pathlib
import secrets

from diffusion_jax.devices.peers import is_loopback
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.recipe import model_name


def run(arguments: argparse.Namespace) -> int:
    """Load a model, serve the page until Ctrl-C, and return 0."""
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise ValueError("serve needs starlette and uvicorn: pip install 'starlette<2' 'uvicorn<1'")
    from diffusion_jax.serve.app import listen, make_app, run_server

    if bool(arguments.workdir) == bool(arguments.checkpoint):
        raise ValueError("give --workdir=RUN or --checkpoint=FILE")
    host, token = arguments.host, arguments.token or None
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(16)
    with listen(host, arguments.port) as listener:
        port = listener.getsockname()[1]
        hosts = ["127.0.0.1", "localhost", "[::1]"] if is_loopback(host) else ["*"]
        model = model_name(arguments.workdir or arguments.checkpoint)
        app = make_app(functools.cache(functools.partial(_load, arguments)), token, hosts, model)
        shown = f"http://{host}:{port}/" + (f"#{token}" if token else "")
        print(f"open {shown}    (Ctrl-C ends it)", flush=True)
        run_server(app, listener)
    return 0


@functools.cache
def _weights(
    workdir: str | None, checkpoint: str | None, config: str | None, overrides: tuple[str, ...]
) -> Pipeline:
    if workdir:
        return Pipeline.from_workdir(workdir, overrides=overrides)
    assert checkpoint is not None
    return Pipeline.from_checkpoint(checkpoint, config, overrides=overrides)


def _load(arguments: argparse.Namespace, sampler: str) -> Pipeline:
    """Load the model once, and build it anew for another sampler."""
    from diffusion_jax.experiment import make_experiment
    from diffusion_jax.runs.released import config_for
    from diffusion_jax.runs.start import open_run

    given = tuple(arguments.overrides)
    pipe = _weights(arguments.workdir, arguments.checkpoint, arguments.config, given)
    if not sampler:
        return pipe
    overrides = [*given, f"--config.sampler.name={sampler}"]
    if arguments.workdir:
        built, _ = open_run(pathlib.Path(arguments.workdir), overrides)
    else:
        built = make_experiment(config_for(arguments.checkpoint, arguments.config, overrides))
    return pipe._replace(experiment=built)
