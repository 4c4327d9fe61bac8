"""Bytes, link time and decode memory of a plan before it is served. No weights, no torch."""

from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.sizing.price import Price, Side, Traffic, price
from pdtrim_deploy.sizing.rates import Rates
from pdtrim_deploy.sizing.subject import Subject, subjects

__all__ = ["Link", "Price", "Rates", "Side", "Subject", "Traffic", "price", "subjects"]
