"""The results that a finished run writes.

negative  the trained model, full weights or LoRA      run_cost    metrics.json: time, energy, speed
merged    a base with its negative mixed in            model_card  the negative's README.md
                                                       hub         upload
"""
