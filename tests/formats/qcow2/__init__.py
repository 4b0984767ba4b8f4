"""Tests of the qcow2 room."""
