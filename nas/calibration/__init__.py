"""How far accuracy estimators can be trusted: trainings as truth, scores against them, and the folder of both."""
