"""Tests of qcow2: opening, mapping, reading."""
