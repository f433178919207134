"""Overlap of moments, exact on whole milliseconds."""

import numpy as np


def milliseconds(seconds) -> np.ndarray:
    """Return times as whole milliseconds, int64, same shape.

    >>> milliseconds((14.2, 23.0))
    array([14200, 23000])
    """
    return np.rint(np.asarray(seconds, dtype=np.float64) * 1000).astype(np.int64)


def span_ms(span) -> tuple[int, int] | None:
    """Return one moment in seconds as whole milliseconds, as records hold it; None for None.

    >>> span_ms((2.5, 9.5))
    (2500, 9500)
    """
    return None if span is None else tuple(milliseconds(span).tolist())


def overlap(a: np.ndarray, b: np.ndarray):
    """Divide the intersection of two moments by their hull, in the arithmetic of their dtype; (..., 2) broadcast.

    Whenever they meet the hull is the union, so this is the IoU. A reversed or empty `a` gets 0 by itself.
    """
    shared = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
    hull = np.maximum(a[..., 1], b[..., 1]) - np.minimum(a[..., 0], b[..., 0])
    iou = np.zeros(shared.shape, dtype=np.result_type(shared.dtype, np.float32))  # int64 becomes float64
    return np.divide(np.maximum(shared, 0), hull, out=iou, where=hull != 0)[()]


def span_iou(a, b):
    """Return the IoU, in [0, 1], of two moments in seconds; shapes (..., 2) broadcast.

    Exact: a quotient of whole milliseconds, so that what is 3/10 equals 0.3.

    >>> float(span_iou((0, 10), (5, 15))) == 5 / 15
    True
    >>> float(span_iou((14.2, 23.0), (16.5, 20.9)))  # plain float64 says 0.4999999999999998
    0.5
    >>> float(span_iou((5, 5), (5, 5))), float(span_iou((15, 5), (5, 15)))
    (0.0, 0.0)
    """
    return overlap(milliseconds(a), milliseconds(b))
