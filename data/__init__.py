"""The shipped bases, tasks and results, and the scripts that make them: `python -m data.build`."""
