"""Training a negative model: one step from the rollout to the optimizer, and the loop around it.

trainer       the loop: log, checkpoints, stopping         state      everything a checkpoint holds
step          one step on the device                       optimizer  AdamW, clipping, the reference's moving average
rollout       where training samples come from             student    the model that is trained, and its reference
objective     from a rollout to the loss                   tandem     how reference and student share a step
checkpoint    checkpoints on disk                          joint      both in one forward pass
snapshot      checkpoints written in the background        capture    a step as one CUDA graph
validation    pictures during training                     attention  the fastest attention backend for each layer
supported     checks of settings against the machine       log        log.jsonl, TensorBoard, Weights & Biases
summary       the lines with which a run begins            without_effect  settings that would change nothing
"""
