"""Tests of formats/luks."""
