"""How texts are read: words, encodings, vocabularies, predictions at positions."""
