"""One HTML file about one or several runs: figures, curves, attention pictures. It opens offline, without scripts."""

from attbalance_ext.grounding.report.page import write_report

__all__ = ["write_report"]
