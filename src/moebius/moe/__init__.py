"""Mixture of experts: router, dispatch, experts, and the losses that keep them balanced."""
