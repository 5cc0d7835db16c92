"""Training a negative model: one step from the rollout to the optimizer, and the loop around it.

trainer       the loop: log, checkpoints, stopping         state      all that a checkpoint holds
step          one step on the device                       optimizer  AdamW, clipping, the reference's average
rollout       where training samples come from             student    what is trained, and its reference
objective     from a rollout to the loss                   tandem     how reference and student share a step
checkpoint    checkpoints on disk                          joint      both in one forward pass
snapshot      checkpoints beside the training              capture    a step as one CUDA graph
validation    pictures on the way                          attention  the fastest attention backend of each layer
supported     what settings and machine allow              log        log.jsonl, TensorBoard, Weights & Biases
summary       the lines with which a run begins            without_effect  settings that would change nothing
"""
