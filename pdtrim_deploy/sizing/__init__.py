"""What a plan costs before it is served: bytes, link time, decode memory. No weights, no torch."""

from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.sizing.price import Price, Side, Traffic, price
from pdtrim_deploy.sizing.rates import Rates
from pdtrim_deploy.sizing.subject import Subject, subjects

__all__ = ["Link", "Price", "Rates", "Side", "Subject", "Traffic", "price", "subjects"]
