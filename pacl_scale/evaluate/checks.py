"""``--check-data``: every file of every data set read and counted, and all that is wrong listed, before any GPU is."""

from collections.abc import Callable, Mapping

from pacl_scale import storage
from pacl_scale.cores import usable_cores
from pacl_scale.data.decode import BadPicture, PictureConfig, decode
from pacl_scale.encoders import Preprocess
from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedConfig, open_captioned
from pacl_scale.evaluate.labelled import LabelledConfig, open_labelled
from pacl_scale.evaluate.pictures import AnnotatedConfig, DataCheck, check_data, open_annotated, read_ahead

NAMED = 10
"""Faults of one data set that are named; the others are counted."""

ANY = Preprocess(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Pictures are only tried: the size does not matter."""


def checked(
    segmentation: Mapping[str, AnnotatedConfig],
    classification: Mapping[str, LabelledConfig],
    retrieval: Mapping[str, CaptionedConfig],
) -> tuple[list[str], int]:
    """A sentence on each data set, and how many of them have faults."""
    sentences, wrong = [], 0
    for name, check in (
        *((name, lambda data=data: _annotated(data)) for name, data in segmentation.items()),
        *((name, lambda data=data: _labelled(data)) for name, data in classification.items()),
        *((name, lambda data=data: _captioned(data)) for name, data in retrieval.items()),
    ):
        try:
            sentence, faults = check()
        except UserError as error:
            sentence, faults = "cannot be read", [str(error)]
        more = [f"and {len(faults) - NAMED} more"] if len(faults) > NAMED else []
        sentences.append("\n  ".join([f"{name}: {sentence}", *faults[:NAMED], *more]))
        wrong += bool(faults)
    return sentences, wrong


def faults_of(count: int, read: Callable[[int], object]) -> list[str]:
    """What ``read`` says of each number below ``count`` that it cannot read."""

    def tried(number: int) -> str | None:
        try:
            read(number)
        except UserError as error:
            return str(error)
        return None

    return [fault for fault in read_ahead(range(count), tried, _threads()) if fault]


def _annotated(config: AnnotatedConfig) -> tuple[str, list[str]]:
    data = open_annotated(config)
    found: DataCheck = check_data(data, _threads())
    absent = f"; no picture shows {', '.join(found.absent)}" if found.absent else "; every class occurs"
    sentence = (
        f"{found.pictures} of {found.expected} pictures read, {len(found.words)} classes{absent}; "
        f"{100 * found.void / max(1, found.pixels):.1f} % of the pixels are not scored"
    )
    return sentence, found.faults


def _labelled(config: LabelledConfig) -> tuple[str, list[str]]:
    data = open_labelled(config)
    labels: set[int] = set()
    faults = faults_of(len(data), lambda place: labels.add(data.read(place)[1]))
    absent = len(data.words) - len(labels) or "none"
    read = len(data) - len(faults)
    return f"{read} of {data.record['of']} pictures read, {len(data.words)} classes, {absent} absent", faults


def _captioned(config: CaptionedConfig) -> tuple[str, list[str]]:
    data = open_captioned(config)

    def read(number: int) -> None:
        address = data.addresses[number]
        try:
            decode(storage.read_bytes(address), ANY, PictureConfig(exact=True), None)
        except BadPicture as error:
            raise UserError(f"{address} cannot be used: {error}") from error

    faults = faults_of(len(data.addresses), read)
    read_well = len(data.addresses) - len(faults)
    return f"{read_well} of {data.record['of']} pictures read, {len(data.texts)} different captions", faults


def _threads() -> int:
    return usable_cores()
