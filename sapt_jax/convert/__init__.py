"""Pretrained weights in and out: rule tables that must cover every key, read in both directions."""
