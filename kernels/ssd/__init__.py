"""State space duality (SSD, Mamba-2): reference.py is the definition, op.py the contract, the other files run it."""
