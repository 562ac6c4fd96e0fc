"""What the server and the workers share: words, bytes, algorithms. Imports nothing of ours above it."""

LIBRARY = "paramserver 0.1.0"
"""Name and version, as peers and checkpoints are told."""
