"""Calibration of accuracy estimators: their scores are compared with the accuracy after long trainings."""
