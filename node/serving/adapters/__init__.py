"""Adapters that guests bring and that the operator keeps: their places, their arrival, sums of gradients."""
