"""What the server and the workers share: words, bytes, algorithms. Imports nothing of ours above it."""
