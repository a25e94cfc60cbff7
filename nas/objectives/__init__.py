"""What is minimised and maximised: objectives, Pareto maths, how two orders agree, and how a figure is printed."""
