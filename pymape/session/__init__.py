"""Successive unlearning requests on one model."""

from pymape.session.session import UnlearnSession, run_request, stored_options, weights_hash

__all__ = ["UnlearnSession", "run_request", "stored_options", "weights_hash"]
