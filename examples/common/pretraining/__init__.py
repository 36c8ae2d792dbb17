"""What pretrain.py is made of: the corpus, the objectives, the Trainer, the picture."""

PYDOC = "pydoc"  # the corpus that each Python installation carries
TINY = "tiny"  # the model that is built here
OBJECTIVES = ("mlm", "alum", "electra", "macbert")
ADVERSARY = {"alum": "alum"}
"""Who plays where an objective names its adversary."""
