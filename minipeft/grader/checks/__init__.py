"""What is graded: a file per method, with its checks by level."""
