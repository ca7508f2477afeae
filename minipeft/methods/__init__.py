"""One paper per file. Each file runs alone: it needs torch and the standard library only."""
