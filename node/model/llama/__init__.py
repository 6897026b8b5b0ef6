"""Llama's family in our own modules: a node of it starts without the library's modelling code."""
