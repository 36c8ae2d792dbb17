"""What pretrain.py is made of: the corpus, the objectives, the Trainer, the picture."""
