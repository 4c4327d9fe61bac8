"""A PD cluster as a discrete-event simulation: nothing is measured; all results follow from given rates."""

from pdtrim_deploy.simulation.cluster import Cluster, simulate
from pdtrim_deploy.simulation.load import Load
from pdtrim_deploy.simulation.result import Figures, Simulated
from pdtrim_deploy.simulation.sized import SizedSide, sized

__all__ = ["Cluster", "Figures", "Load", "Simulated", "SizedSide", "simulate", "sized"]
