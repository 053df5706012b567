"""Timings of whole processes; never part of the tests."""
