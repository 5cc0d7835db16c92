"""What a run will need, counted before it starts and without loading weights.

memory  bytes, row by row                              cost    FLOPs, hours and measured speed
advice  settings that would fit                        meta    the counting itself, on the meta device
"""
