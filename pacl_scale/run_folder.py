"""What a run directory says of its run, for readers that are not that run; imports nothing that is slow."""

from typing import Any

import yaml

from pacl_scale import storage


def settings_of(run: str) -> dict[str, Any]:
    """The settings that a run was started with; empty where there are none that can be read (yet, or any more)."""
    saved = storage.join(run, "config.yaml")
    if not storage.exists(saved):
        return {}
    try:
        settings = yaml.safe_load(storage.read_bytes(saved))
    except (yaml.YAMLError, UnicodeDecodeError):
        # A full disk may have cut the file short; training says so.
        return {}
    return settings if isinstance(settings, dict) else {}


def checkpoints_of(run: str, settings: dict[str, Any] | None = None) -> str:
    """Where the checkpoints of a run lie: its ``checkpoint.folder``, or ``checkpoints`` beside its logs.

    Args:
        settings: of the run, if they are known; read from its directory otherwise.
    """
    settings = settings_of(run) if settings is None else settings
    return (settings.get("checkpoint") or {}).get("folder") or storage.join(run, "checkpoints")
