"""Why a row of the list has no sample: one word a row, decided where the fault is seen."""

RETRIED_SCHEME = "retried"
"""Before the URL of a row that must not be asked for, because a later shard has its last attempt."""

CAUSES = {
    "aspect_ratio": "longer in one direction than fetch.largest_aspect_ratio allows",
    "backoff": "not asked: the host failed too often just before",
    "connection": "refused, reset or closed by the server or on the way",
    "decoder": "decoding it ended its process or took too long, twice",
    "dns": "the host's name does not resolve",
    "empty": "an answer without a body",
    "evaluation_picture": "one of the pictures that fetch.exclude lists, or nearly",
    "not_an_image": "a body that cannot be decoded as a picture",
    "opt_out": "X-Robots-Tag asks not to be used for machine learning or indexing",
    "private_address": "the host, or a redirect, leads to an address that is not public",
    "protocol": "an answer that is not HTTP",
    "redirects": "too many redirects, or one to something that is not http(s)",
    "retried": "not asked: a later shard asked again, and its answer stands",
    "timeout": "not answered, or not finished, in time",
    "tls": "no secure connection: certificate or handshake",
    "too_large": "more bytes than fetch.largest_body_mb allows",
    "too_many_pixels": "more pixels than fetch.largest_megapixels allows, or many scans of many",
    "too_small": "shorter side below fetch.smallest_side",
    "truncated": "the body ended before its announced length",
    "other": "anything else; see error_message in the shard's parquet file",
}
"""Every cause but the refusals by status, which read ``http_404``."""


class FetchError(Exception):
    """A picture that cannot be had. Its text is ``cause: detail``, which img2dataset writes down.

    ``retry_after_s`` is how long the server asked to be left alone.
    """

    def __init__(self, cause: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.retry_after_s = retry_after_s


def cause_of(error_message: str) -> str:
    """The cause within an error message of a shard's parquet file."""
    cause = error_message.partition(":")[0]
    return cause if cause in CAUSES or cause.startswith("http_") else "other"
