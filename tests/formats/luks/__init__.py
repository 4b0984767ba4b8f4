"""Tests of the LUKS header."""
