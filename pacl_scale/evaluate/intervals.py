"""Bootstrap confidence intervals: how much a figure would move with another draw of as many pictures.

Pictures are drawn with replacement and the scores computed anew from the sums of their exact counts; an interval is
the middle 95 % of the results (percentile bootstrap, Efron 1979). P pictures, C classes, D draws.
"""

import functools

import numpy as np

DRAWS = 1000
SEED = 0
LEVEL = 0.95
DRAWS_AT_ONCE = 50

Interval = list[float] | None
"""Lower and upper end, as shares; None without a picture."""


def intervals(
    counts_P3C: np.ndarray,
    miou_P: np.ndarray | None = None,
    draws: int = DRAWS,
    bands_P3C: np.ndarray | None = None,
    patches_P2: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Intervals of the scores over a data set.

    Args:
        counts_P3C: of each picture and class, pixels found, true pixels, and predicted pixels, int64.
        miou_P: mIoU of each picture, NaN where it has none; adds ``miou_per_picture``.
        draws: how often as many pictures are drawn.
        bands_P3C: the same counts along outlines; adds ``boundary_iou``.
        patches_P2: right patches and patches; adds ``patch_accuracy``.

    Returns:
        Score to its interval.
    """
    names = ["miou", "pixel_accuracy", "mean_class_accuracy"]
    names += ["miou_per_picture"] if miou_P is not None else []
    names += ["boundary_iou"] if bands_P3C is not None else []
    names += ["patch_accuracy"] if patches_P2 is not None else []
    pictures = len(counts_P3C)
    if not pictures:
        return dict.fromkeys(names)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    times = times_drawn(pictures, draws)
    for start in range(0, draws, DRAWS_AT_ONCE):
        # Sums of integers below 2^53 are exact in float64, which has a fast product.
        times_DP = times[start : start + DRAWS_AT_ONCE].astype(np.float64)
        hits_DC, truth_DC, predicted_DC = _sums(times_DP, counts_P3C)
        values = {
            "miou": _miou(hits_DC, truth_DC, predicted_DC),
            "pixel_accuracy": _ratio(hits_DC.sum(axis=1), truth_DC.sum(axis=1)),
            "mean_class_accuracy": _mean(_ratio(hits_DC, truth_DC), truth_DC > 0),
        }
        if miou_P is not None:
            scored_P = ~np.isnan(miou_P)
            values["miou_per_picture"] = _ratio(
                times_DP[:, scored_P] @ miou_P[scored_P], times_DP[:, scored_P].sum(axis=1)
            )
        if bands_P3C is not None:
            values["boundary_iou"] = _miou(*_sums(times_DP, bands_P3C))
        if patches_P2 is not None:
            right_D, patches_D = (times_DP @ patches_P2.astype(np.float64)).T
            values["patch_accuracy"] = _ratio(right_D, patches_D)
        for name, value_D in values.items():
            found[name].append(value_D)
    return {name: _middle(np.concatenate(parts)) for name, parts in found.items()}


def share_interval(right_Q: np.ndarray) -> list[float]:
    """The interval of the share of queries that are right: binomial, as each is right or not."""
    shares = np.random.default_rng(SEED).binomial(len(right_Q), right_Q.mean(), DRAWS) / len(right_Q)
    return _middle(shares)


def mean_per_class_interval(hits_C: np.ndarray, pictures_C: np.ndarray) -> list[float]:
    """The interval of the mean over the classes drawn of the share of their pictures that is right.

    Each draw is as many pictures; what matters of one is its class and whether it is right.
    """
    kinds_2C = np.stack([hits_C, pictures_C - hits_C])
    pictures = int(pictures_C.sum())
    shares = (kinds_2C / pictures).ravel()
    drawn_D2C = np.random.default_rng(SEED).multinomial(pictures, shares, size=DRAWS).reshape(DRAWS, 2, -1)
    all_DC = drawn_D2C.sum(axis=1)
    return _middle(_mean(_ratio(drawn_D2C[:, 0], all_DC), all_DC > 0))


@functools.lru_cache(maxsize=2)
def times_drawn(pictures: int, draws: int) -> np.ndarray:
    """How often each picture is drawn, (D, P); the same for every score, so that scores move together."""
    random = np.random.default_rng(SEED)
    shares = [1 / pictures] * pictures
    parts = [
        random.multinomial(pictures, shares, size=min(DRAWS_AT_ONCE, draws - start)).astype(np.int32)
        for start in range(0, draws, DRAWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _sums(times_DP: np.ndarray, counts_P3C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sums_D3C = np.tensordot(times_DP, counts_P3C.astype(np.float64), axes=1)
    return sums_D3C[:, 0], sums_D3C[:, 1], sums_D3C[:, 2]


def _miou(hits_DC: np.ndarray, truth_DC: np.ndarray, predicted_DC: np.ndarray) -> np.ndarray:
    return _mean(_ratio(hits_DC, truth_DC + predicted_DC - hits_DC), truth_DC > 0)


def _middle(values_D: np.ndarray) -> list[float]:
    tail = 100 * (1 - LEVEL) / 2
    return [float(end) for end in np.percentile(values_D, [tail, 100 - tail])]


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.zeros_like(over, dtype=np.float64), where=under > 0)


def _mean(values_DC: np.ndarray, present_DC: np.ndarray) -> np.ndarray:
    return _ratio((values_DC * present_DC).sum(axis=1), present_DC.sum(axis=1).astype(np.float64))
