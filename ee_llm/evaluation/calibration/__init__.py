"""Calibration: thresholds with the largest saving whose risk has a finite-sample guarantee."""
