"""Samples with guidance away from a negative model, and how they are shown.

ddim     the sampler                                   decode   from latents to pixels
sweep    many guidance scales and strengths            picture  PNG grids
                                                       video    GIF and MP4
"""
