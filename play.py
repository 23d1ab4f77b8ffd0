"""Open a page in the browser: draw a hint with the mouse, type a prompt, and see the ControlNet obey.

    python play.py --model runs/demo                     the page of the demo's ControlNet, at http://127.0.0.1:7860
    python play.py --model sd15.safetensors --control canny.safetensors --control depth.safetensors
    python play.py --model runs/demo --host 0.0.0.0      for others in the same network, too

The server is the standard library's. It listens to this machine alone unless --host says otherwise; `playground/` has
the page, the checks, and the line in which drawings wait for the device.
"""

import argparse
import os
import signal
import sys
import threading
import webbrowser

from config import default_device
from flags import parse_play
from training.console import protect_output, run_program

if __name__ == "__main__":  # --help and wrong flags are answered before the imports below, which take seconds
    protect_output()
    parse_play(None)

from playground.model import Choices, load, missing_model
from playground.routes import Routes
from playground.server import Server, is_loopback
from weights import CheckpointError


def parse(argv: list[str] | None) -> argparse.Namespace:
    """What the command line asks for (see `flags.parse_play`), with the device that computes."""
    args = parse_play(argv)
    args.device = args.device if "device" in args else default_device()
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if problem := missing_model(args.model):
        raise CheckpointError(problem)
    print(f"loading {args.model}", flush=True)
    choices = Choices(args.model, args.base, tuple(args.control), args.vae, args.device, args.precision)
    routes = Routes(load(choices))
    with listen(args.host, args.port, routes) as server:
        print(f"the page: {server.url}   (Ctrl-C ends it)", flush=True)
        if not is_loopback(args.host):
            print(f"--host {args.host}: everyone who reaches this machine can draw on it", flush=True)
        if args.browser and is_loopback(args.host) and has_screen():
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("the page is closed")
        finally:
            routes.line.close()
            server.wait_for_threads(5.0)


def listen(host: str, port: int, routes: Routes) -> Server:
    """A server at `host` and `port`. CheckpointError, with what to do, if that is not possible."""
    try:
        return Server(host, port, routes.table())
    except OSError as e:
        way_out = "; --port 0 takes a free one" if port else ""
        raise OSError(f"{host}:{port} cannot be listened at ({e.strerror or e}){way_out}") from e


def has_screen() -> bool:
    """Whether a browser with a window can be opened, and not one of text in the terminal."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


if __name__ == "__main__":
    run_program("play.py", main, interrupted="ended by Ctrl-C")
