"""Parts of study.py: what is to be run, running it, and the report."""
