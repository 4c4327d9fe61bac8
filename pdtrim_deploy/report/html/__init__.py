"""One self-contained HTML page about a bundle: no script, no font, no request to anywhere."""

from pdtrim_deploy.report.html.collect import Findings, read_faults, read_pareto
from pdtrim_deploy.report.html.page import page

__all__ = ["Findings", "page", "read_faults", "read_pareto"]
