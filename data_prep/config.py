"""What a download is asked to do."""

from dataclasses import dataclass, field
from typing import Literal

from data_prep import sources
from data_prep.fetch import FetchConfig
from data_prep.parts import Part
from data_prep.prepare import ExpectConfig, PrepareConfig
from data_prep.retry import RetryConfig
from data_prep.slurm import SlurmConfig
from pacl_scale.errors import UserError


@dataclass
class DownloadConfig:
    """Download the pictures of a URL list into WebDataset tars, verify and index them.

    VERB is left out for all of it, or one of: prepare (read the list, plan the shards), verify (read every finished
    shard to its end, set damaged ones aside), index (of what is sound), report (report.html and report.json), retry
    (ask again for what may have healed). --slurm queues the same on a Slurm cluster, shared out over slurm.parts jobs.

    Credentials of an object store come from its own environment variables (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL).
    """

    output: str
    """Where the data set goes: a folder, as a path or fsspec URL (s3://bucket/name)."""
    url_list: str = ""
    """The list: a path or fsspec URL of a .tsv, .csv or .parquet file (.tsv.gz, .csv.gz); not given, the file in the
    current folder that is named as the source's page names it (Train_GCC-training.tsv for cc3m)."""
    source: str = "pairs"
    """What kind of list it is, which tells its columns: pairs (your own, caption TAB url), cc3m, cc12m or yfcc15m; or
    mirror: no list, output holds WebDataset tars that somebody made, which are verified and indexed."""
    metadata: str | None = None
    """Second file of a source that needs one: YFCC100M's yfcc100m_dataset.bz2 for yfcc15m."""
    expect: ExpectConfig = field(default_factory=ExpectConfig)
    """What the list must be; nothing is written if it is another."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How the list becomes shards."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How pictures are downloaded and stored."""
    again: bool = False
    """Ask again for what failed for a cause that may pass (retry.causes): one round a call, once all else is there."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """Which failures are asked for again and how."""
    verify: Literal["new", "all"] = "new"
    """Which finished shards are read back: those not verified before, or all."""
    part: int = 0
    """Number of the part that this run takes, from 0; the run that ends the last part indexes and reports."""
    parts: int = 1
    """Parts that the list is cut into; runs on different parts may work at the same time."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """The jobs that --slurm queues."""

    def __post_init__(self) -> None:
        source = sources.get(self.source)
        self.url_list = self.url_list or source.file
        if self.metadata is not None and not source.needs_metadata:
            raise ValueError(f"metadata is given, but {source.name} has no second file")
        if self.parts < 1 or not 0 <= self.part < self.parts:
            raise ValueError("parts must be at least 1, and part between 0 and parts - 1")
        if self.is_mirror and self.parts > 1:
            raise ValueError("parts: tars of a mirror are not downloaded, and not cut into parts")
        if self.is_mirror and (self.expect.sha256 or self.expect.metadata_sha256):
            raise ValueError("expect.sha256: a mirror has no list; expect.rows is the number of its samples")
        if self.again and self.parts > 1:
            raise ValueError("again: a round of retries is planned for the whole list, not for one of its parts")

    @property
    def is_mirror(self) -> bool:
        """Whether there are tars instead of a list."""
        return self.source == sources.MIRROR

    @property
    def own_part(self) -> Part:
        """What this run takes of the list."""
        return Part(self.part, self.parts)

    def require_list(self) -> None:
        """Raise UserError unless the configuration names the files that a list is read from."""
        source = sources.get(self.source)
        if not self.url_list:
            raise UserError(f"url_list is missing: a list of {source.name} has no usual name")
        if source.needs_metadata and self.metadata is None:
            raise UserError(f"metadata is missing: {source.name} needs {source.metadata_file}")
