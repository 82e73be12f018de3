"""What the ranks say to each other: tensors, objects, random states."""
