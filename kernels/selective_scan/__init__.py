"""The selective scan (S6, Mamba-1): reference.py is the definition, op.py the contract, the *_path files run it."""
