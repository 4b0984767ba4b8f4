"""LUKS version 1: the header that says how an image is encrypted."""
