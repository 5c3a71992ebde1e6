"""Classifying pictures with timm's networks: train, score, predict; the judge of generated pictures."""
