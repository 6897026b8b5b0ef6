"""Raceme next to llama.cpp and transformers, with the same weights on one machine."""
