"""Trains a small Mixture-of-Experts language model whose experts and router run on sonicmoe."""
