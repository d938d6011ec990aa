"""Model folders: the one way to read what from_pretrained reads, teacher or student.

folder      config, tokenizer and weights of a folder, each read once; all that goes wrong is one line
weights     which files hold the weights, and whether every weight of the model is in them
own_code    Python that a folder brings, and the digest by which it is allowed to run
"""
