"""Measures time and memory of jaxkl and its peers: run `make bench`."""
