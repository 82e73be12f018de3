"""What runs the model, behind one door: the `Backend`. The only room that talks to DeepSpeed."""
