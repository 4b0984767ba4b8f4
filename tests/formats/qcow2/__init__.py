"""Tests of formats/qcow2."""
