"""Time and memory of jaxkl beside its peers: `make bench`."""
