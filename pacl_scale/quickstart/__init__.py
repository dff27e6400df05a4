"""What ``make demo`` runs and needs: drawn pictures, a web server for them, an object store, and the stages."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``quickstart``; returns its exit status."""
    # Imported here, so that the tests' S3 server does not wait for torch.
    from pacl_scale.quickstart.pipeline import main as run

    return run(argv)
