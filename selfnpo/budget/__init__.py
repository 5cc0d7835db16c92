"""What a run will take, counted without weights before it starts.

memory  bytes, row by row                              cost    FLOPs, hours, and what was measured beside them
advice  settings that would fit                        meta    the counting itself, on the meta device
"""
