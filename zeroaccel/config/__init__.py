"""What was asked for, and what it becomes. Pure: nothing here needs torch, a GPU or another process."""
