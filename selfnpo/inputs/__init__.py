"""What a run reads besides the model: prompts, image folders, the demo's digits."""
