"""Bootstrap confidence intervals: how much a figure would move with another draw of as many pictures.

Pictures are drawn with replacement and the scores computed anew from the sums of their exact counts; an interval is
the middle 95 % of the results (percentile bootstrap, Efron 1979).
"""

import numpy as np

DRAWS = 1000
SEED = 0
LEVEL = 0.95
DRAWS_AT_ONCE = 50


def intervals(counts_P3C: np.ndarray, miou_P: np.ndarray, draws: int = DRAWS) -> dict[str, list[float] | None]:
    """Intervals of the scores over a data set.

    Args:
        counts_P3C: of each picture and class, pixels found, true pixels, and predicted pixels, int64.
        miou_P: mIoU of each picture; NaN where it has none.
        draws: how often as many pictures are drawn.

    Returns:
        Score to its lower and upper end, as shares; None without a picture.
    """
    pictures = len(counts_P3C)
    if not pictures:
        return dict.fromkeys(("miou", "pixel_accuracy", "mean_class_accuracy", "miou_per_picture"))
    random = np.random.default_rng(SEED)
    found: dict[str, list[np.ndarray]] = {}
    scored_P = ~np.isnan(miou_P)
    for start in range(0, draws, DRAWS_AT_ONCE):
        times_DP = random.multinomial(pictures, [1 / pictures] * pictures, size=min(DRAWS_AT_ONCE, draws - start))
        # Sums of integers below 2^53 are exact in float64, which has a fast product.
        sums_D3C = np.tensordot(times_DP.astype(np.float64), counts_P3C.astype(np.float64), axes=1)
        hits_DC, truth_DC, predicted_DC = sums_D3C[:, 0], sums_D3C[:, 1], sums_D3C[:, 2]
        present_DC = truth_DC > 0
        iou_DC = _ratio(hits_DC, truth_DC + predicted_DC - hits_DC)
        values = {
            "miou": _mean(iou_DC, present_DC),
            "pixel_accuracy": _ratio(hits_DC.sum(axis=1), truth_DC.sum(axis=1)),
            "mean_class_accuracy": _mean(_ratio(hits_DC, truth_DC), present_DC),
            "miou_per_picture": _ratio(
                times_DP[:, scored_P] @ miou_P[scored_P], times_DP[:, scored_P].sum(axis=1).astype(np.float64)
            ),
        }
        for name, value_D in values.items():
            found.setdefault(name, []).append(value_D)
    tail = 100 * (1 - LEVEL) / 2
    return {
        name: [float(end) for end in np.percentile(np.concatenate(parts), [tail, 100 - tail])]
        for name, parts in found.items()
    }


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.zeros_like(over, dtype=np.float64), where=under > 0)


def _mean(values_DC: np.ndarray, present_DC: np.ndarray) -> np.ndarray:
    return _ratio((values_DC * present_DC).sum(axis=1), present_DC.sum(axis=1).astype(np.float64))
