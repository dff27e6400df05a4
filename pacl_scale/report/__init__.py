"""A run as one HTML file that needs no network: pictures with masks, scores, curves, data, time.

``python -m pacl_scale.report runs/photos`` writes ``runs/photos/report.html``.
"""

from pacl_scale.report.page import main, write_report

__all__ = ["main", "write_report"]
