"""What a run reads beside the model: prompts, image folders, the demo's digits."""
