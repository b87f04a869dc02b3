"""`ui`: serve the painter page until it is stopped."""

from __future__ import annotations

import gc
import ipaddress
import secrets
import socket
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from minpaint import load
from minpaint.cli.options import Note, source
from minpaint.cli.paint import record_of, run_of
from minpaint.engine.device import dtype_name
from minpaint.errors import InputError
from minpaint.picture.saving import Record
from minpaint.settings import Settings

EVERYONE = (
    "lets other machines in: whoever has the URL, which is not encrypted on its way, sees your pictures and paints"
)


def ui(options: Namespace, note: Note) -> None:
    """Load the model, print the page's URL, and serve."""
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise InputError('the painter page needs starlette and uvicorn; pip install "minpaint[ui]"')
    from minpaint.ui.server import serve
    from minpaint.ui.studio import Studio

    with _listen(options) as listening:
        folder = Path(options.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output {folder} cannot be a folder ({error}); name another") from None
        names = ("model", "device", "dtype", "budget", "config", "fast", "vae", "lora")
        painter = load(**{name: getattr(options, name) for name in names})
        gc.enable()  # see __main__
        note(f"{painter.name} on {painter.device}, {dtype_name(painter.dtype)}; pictures are kept in {folder}")

        def record(settings: Settings, image: Path, mask: Path | None) -> Record:
            """What `paint` would leave in a file that it paints from these."""
            given = {"settings": settings, "image": str(image), "mask": mask and str(mask), "repeats": None}
            asked = Namespace(**vars(options) | given)
            begun = record_of(asked, source(asked.image, "image"), source(asked.mask, "mask") if mask else None)
            return begun | {"ignored": painter.ignored(settings), **run_of(painter, note)}

        studio, token = Studio(painter, folder, record), secrets.token_urlsafe(24)
        host, port = listening.getsockname()[:2]
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        if options.listen_to_everyone:
            note(f"note: {options.host} {EVERYONE}")
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={token}", flush=True)
        try:
            serve(studio, listening, token)
        except KeyboardInterrupt:  # the way to stop it
            note("stopped")
        finally:
            studio.close()


def _listen(options: Namespace) -> socket.socket:
    """The socket that is served; InputError if the port is taken, or others could reach it and were not invited."""
    host = "127.0.0.1" if options.host == "localhost" else options.host
    try:
        address = ipaddress.ip_address(host)
        if not (address.is_loopback or options.listen_to_everyone):
            raise InputError(f"host {host} {EVERYONE}; leave it out, or add --listen-to-everyone")
        return socket.create_server(
            (host, options.port), family=socket.AF_INET6 if address.version == 6 else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {options.port} ({error}); choose another --port") from None
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"host {host} is no IP address") from None
