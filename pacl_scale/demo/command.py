"""The command: a checkpoint in, a web page on the loopback interface out."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pacl_scale import config, log
from pacl_scale.demo.guard import is_loopback
from pacl_scale.demo.studio import Studio, examples_in
from pacl_scale.errors import UserError
from pacl_scale.evaluate.command import run_of
from pacl_scale.evaluate.methods import PACL, choose_device, load_methods
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.look import check_protocol

PROG = "python -m pacl_scale.demo"

logger = log.get_logger("pacl_scale.demo")


@dataclass
class DemoConfig:
    """A page that colours the parts of a picture by the words that fit them; nothing leaves this machine."""

    host: str = "127.0.0.1"
    """Interface to listen on. Anything but loopback lets others use the page: it has no password."""

    port: int = 8080
    """Port to listen on; 0 takes a free one."""

    upload_mb: int = 20
    """Larger uploads are refused while they arrive."""

    megapixels: int = 40
    """Pictures of more million pixels are refused before they are decoded."""

    examples: str | None = None
    """Folder of example pictures; not given, those that an evaluation left in the run, if there are any."""

    size: int = 0
    """Pixels of the picture's short side in the vision tower; 0 takes the tower's own."""

    stride: int = 0
    """Pixels between patches; 0 is the patch size. Less is finer and slower."""

    templates: Literal["paper", "single", "none"] = "paper"
    """Prompts around each word: the paper's seven, "a photo of a {}.", or the bare word."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of the towers."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes CUDA where there is a GPU."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError("port lies between 0 and 65535")
        if self.upload_mb < 1 or self.megapixels < 1:
            raise ValueError("upload_mb and megapixels must be at least 1")
        if self.size < 0 or self.stride < 0:
            raise ValueError("size and stride cannot be negative")


def run(argv: Sequence[str] | None) -> int:
    """Parse, load, serve until interrupted; returns 0."""
    positionals: list[tuple[str, dict[str, Any]]] = [
        ("checkpoint", {"help": "Run directory, checkpoint or exported folder."})
    ]
    settings, given = config.parse(DemoConfig, argv, PROG, positionals)
    log.configure()
    try:
        from pacl_scale.demo.page import serve
    except ImportError as error:
        raise UserError("the page needs nicegui; run: pip install 'pacl-scale[page]'") from error
    port = free_port(settings.host, settings.port)
    studio = open_studio(settings, given["checkpoint"])
    if not is_loopback(settings.host):
        logger.warning("this page has no password, and others can reach it", host=settings.host)
    serve(studio, settings.host, port, settings.upload_mb * 2**20)
    return 0


def open_studio(settings: DemoConfig, checkpoint: str) -> Studio:
    """The model of a checkpoint with the examples that its page offers.

    Raises:
        UserError: no checkpoint there, or one that cannot be used with these settings.
    """
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    towers, (method,) = load_methods({PACL: checkpoint}, None, choose_device(settings.device), dtype)
    protocol = Protocol(size=settings.size, stride=settings.stride, templates=settings.templates)
    check_protocol(towers, protocol)
    examples = examples_in(settings.examples, run_of(checkpoint))
    return Studio(towers, method, protocol, settings.megapixels * 1_000_000, examples, checkpoint)


def free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0.

    Raises:
        UserError: it is taken, or ``host`` is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server will: a port that was in use a moment ago is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another port"
        ) from error
